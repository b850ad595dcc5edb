"""Numbers of bytes in messages; importable without torch."""

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def describe_bytes(count: int) -> str:
    """Return a number of bytes in the unit that a reader expects.

    Example:
        >>> describe_bytes(512), describe_bytes(3 * 2**20), describe_bytes(3_400_000_000)
        ('512 bytes', '3.0 MiB', '3.2 GiB')
    """
    size, unit = float(count), 0
    while size >= 1023.95 and unit < len(_UNITS) - 1:  # which would be shown as 1024.0
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {_UNITS[unit]}" if unit else f"{count} bytes"
