"""Memory is what the system and the limits of a container leave."""

from pathlib import Path

import psutil
import pytest

from kd_lightning.files.memory import available_memory

MIB = 2**20
MEMINFO = "MemTotal: 64000000 kB\nMemFree: 1 kB\nMemAvailable:    1048576 kB\n"


def machine(root: Path, cgroup: str, files: dict[str, str], meminfo: str | None = MEMINFO) -> Path:
    """Write the files in which Linux says how much memory there is."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    if meminfo is not None:
        (root / "proc/meminfo").write_text(meminfo)
    return root


def group(folder: str, limit: object, used: int, cache: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {cache}\nactive_file 7\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 1024),
        ("0::/\n", group("sys/fs/cgroup", 512 * MIB, 200 * MIB, 100 * MIB), 412),
        ("0::/a/b\n", group("sys/fs/cgroup/a", 512 * MIB, 200 * MIB), 312),
        (
            "0::/a/b\n",
            group("sys/fs/cgroup/a", "max", 200 * MIB) | group("sys/fs/cgroup/a/b", 300 * MIB, 200 * MIB),
            100,
        ),
        ("0::/a\n", group("sys/fs/cgroup/a", 100 * MIB, 200 * MIB), 0),
        ("0::/a\n", group("sys/fs/cgroup/a", 9999 * MIB, 0), 1024),
        ("0::/gone\n", {}, 1024),
        (
            "4:memory:/jobs/7\n1:cpu:/\n0::/\n",
            {
                "sys/fs/cgroup/memory/jobs/7/memory.limit_in_bytes": f"{800 * MIB}",
                "sys/fs/cgroup/memory/jobs/7/memory.usage_in_bytes": f"{300 * MIB}",
                "sys/fs/cgroup/memory/jobs/7/memory.stat": f"total_inactive_file {50 * MIB}\n",
            },
            550,
        ),
    ],
)
def test_limits_of_control_groups(cgroup: str, files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, cgroup, files)) == expected * MIB


def test_systems_without_these_files_give_a_part_of_their_memory(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == psutil.virtual_memory().total // 2


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux says it there")
def test_it_is_at_most_what_psutil_counts() -> None:
    assert 0 < available_memory() <= 1.1 * psutil.virtual_memory().available
