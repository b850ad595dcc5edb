"""Images are read as a viewer shows them, whatever their format."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image, ImageFile

from kd_lightning.errors import UserError
from kd_lightning.files import images
from kd_lightning.files.images import (
    UnreadableImageError,
    describe_unreadable,
    load_image,
    readable_suffixes,
    shown_size,
)

Pixels = npt.NDArray[np.uint8]
WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def corners(image: Image.Image) -> str:
    """Return the colours of the four corners (r, g, b or k), clockwise from the top left."""
    right, bottom = image.width - 1, image.height - 1
    places = [(0, 0), (right, 0), (right, bottom), (0, bottom)]
    pixels = np.asarray(image.convert("RGB"))
    names = {0: "r", 1: "g", 2: "b"}
    colours = [pixels[y, x] for x, y in places]
    return "".join(names[int(colour.argmax())] if colour.max() > 100 else "k" for colour in colours)


def upright(width: int = 48, height: int = 32) -> Image.Image:
    """Return an image whose corners are red, green, blue and black, clockwise from the top left."""
    image = Image.new("RGB", (width, height))
    half = width // 2, height // 2
    image.paste((255, 0, 0), (0, 0, *half))
    image.paste((0, 255, 0), (half[0], 0, width, half[1]))
    image.paste((0, 0, 255), (*half, width, height))
    return image


# the turn that a camera undoes by writing the orientation
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def as_stored(orientation: int) -> Image.Image:
    turn = STORED[orientation]
    return upright() if turn is None else upright().transpose(turn)


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_an_image_is_turned_as_its_orientation_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    file = tmp_path / f"a.{suffix}"
    as_stored(orientation).save(file, exif=with_orientation(orientation))
    shown = load_image(file, "RGB")
    assert corners(shown) == "rgbk"
    assert shown.size == (48, 32)
    assert shown_size(file) == (32, 48)


def test_an_orientation_in_avif_is_read(tmp_path: Path) -> None:
    if ".avif" not in readable_suffixes():
        pytest.skip("this Pillow does not read AVIF")
    as_stored(6).save(tmp_path / "a.avif", exif=with_orientation(6))
    assert corners(load_image(tmp_path / "a.avif", "RGB")) == "rgbk"


def test_an_orientation_behind_the_pixels_of_png_is_read(tmp_path: Path) -> None:
    content = io.BytesIO()
    as_stored(6).save(content, "PNG", exif=with_orientation(6))
    written = content.getvalue()
    start = written.index(b"eXIf") - 4
    length = int.from_bytes(written[start : start + 4], "big") + 12
    end = written.index(b"IEND") - 4
    moved = written[:start] + written[start + length : end] + written[start : start + length] + written[end:]
    (tmp_path / "a.png").write_bytes(moved)
    assert corners(load_image(tmp_path / "a.png", "RGB")) == "rgbk"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("damaged", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0"])
def test_a_damaged_orientation_counts_as_none(tmp_path: Path, damaged: bytes) -> None:
    upright().save(tmp_path / "a.jpg", exif=damaged)
    assert corners(load_image(tmp_path / "a.jpg", "RGB")) == "rgbk"
    assert shown_size(tmp_path / "a.jpg") == (32, 48)


def glyph(mode: str) -> Image.Image:
    """Return a black square on transparent ground, whose hidden colour is black too."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    return image.convert(mode) if mode != "P" else image.quantize(4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("wanted", ["RGB", "L"])
def test_transparent_parts_are_white(tmp_path: Path, mode: str, wanted: str) -> None:
    glyph(mode).save(tmp_path / "a.png")
    shown = load_image(tmp_path / "a.png", wanted).convert("RGB")
    assert shown.getpixel((0, 0)) == WHITE
    assert shown.getpixel((3, 3)) == BLACK


def test_half_transparent_parts_are_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", "RGB").getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize(("mode", "colour"), [("1", 0), ("L", 7), ("RGB", (1, 2, 3)), ("P", 0)])
def test_a_transparent_colour_is_white(tmp_path: Path, mode: str, colour: int | tuple[int, ...]) -> None:
    image = Image.new(mode, (8, 8), colour)
    image.paste(1 if mode == "P" else RED if mode == "RGB" else 200, (0, 0, 2, 2))
    image.save(tmp_path / "a.png", transparency=colour)
    shown = load_image(tmp_path / "a.png", "RGB")
    assert shown.getpixel((5, 5)) == WHITE
    assert mode != "RGB" or shown.getpixel((0, 0)) == RED


def test_opaque_images_with_an_alpha_channel_keep_their_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    pixels[:, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png", "RGB")), pixels[:, :, :3])


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLACK, WHITE)]
    for suffix in ("gif", "webp", "tiff", "png"):
        file = tmp_path / f"a.{suffix}"
        frames[0].save(file, save_all=True, append_images=frames[1:])
        pixel = np.asarray(load_image(file, "RGB"))[0, 0]
        assert np.abs(pixel - np.array(RED)).max() < 5, suffix


def test_colours_become_grey_by_luma(tmp_path: Path) -> None:
    upright().save(tmp_path / "a.png")
    grey = load_image(tmp_path / "a.png", "L")
    assert [grey.getpixel(place) for place in ((0, 0), (47, 0), (47, 31))] == [76, 150, 29]


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("CMYK", "tiff"), ("YCbCr", "jpg"), ("1", "png")])
def test_other_colour_spaces_have_the_right_colours(tmp_path: Path, mode: str, suffix: str) -> None:
    image = upright() if mode != "1" else Image.new("1", (48, 32), 1)
    image.convert(mode).save(tmp_path / f"a.{suffix}")
    shown = load_image(tmp_path / f"a.{suffix}", "RGB")
    assert shown.getpixel((0, 0)) == WHITE if mode == "1" else corners(shown) == "rgbk"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_of_grey_are_refused_by_their_header(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "a.tiff"
    Image.fromarray(np.full((4, 4), 300, dtype={"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])).save(file)
    for read in (shown_size, lambda file: load_image(file, "L")):
        with pytest.raises(UnreadableImageError, match=r"a\.tiff' has more than 8 bits a pixel of grey; save it with"):
            read(file)


def test_another_format_than_the_suffix_says_is_read(tmp_path: Path) -> None:
    upright().save(tmp_path / "a.jpg", format="PNG")
    assert corners(load_image(tmp_path / "a.jpg", "RGB")) == "rgbk"


def test_formats_that_other_programs_draw_are_refused(tmp_path: Path) -> None:
    upright().save(tmp_path / "a.jpg", format="EPS")  # which Pillow gives to Ghostscript
    with pytest.raises(UnreadableImageError, match="cannot be read as an image"):
        load_image(tmp_path / "a.jpg", "RGB")


def test_all_suffixes_of_photographs_that_pillow_reads_are_known() -> None:
    known = {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
    assert known <= readable_suffixes()
    assert (".avif" in readable_suffixes()) == ("AVIF" in Image.OPEN)
    assert not {".h5", ".mpg", ".eps", ".ps", ".pdf", ".txt"} & readable_suffixes()


def test_an_installed_package_adds_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode = (2, 2), "L"
            self.tile = [("raw", (0, 0, 2, 2), 4, "L")]  # type: ignore[list-item]  # a tuple, since Pillow 10 has no _Tile

    def register_heif_opener() -> None:
        Image.register_open("HEIF", Heif, lambda prefix: prefix.startswith(b"heif"))
        Image.register_extension("HEIF", ".heic")

    images._register_plugins.cache_clear()
    for name, value in (("ID", [*Image.ID]), ("OPEN", {**Image.OPEN}), ("EXTENSION", {**Image.EXTENSION})):
        monkeypatch.setattr(Image, name, value)
    monkeypatch.setitem(
        __import__("sys").modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener)
    )
    assert ".heic" in readable_suffixes()
    (tmp_path / "a.heic").write_bytes(b"heif\1\2\3\4")
    assert np.asarray(load_image(tmp_path / "a.heic", "L")).tolist() == [[1, 2], [3, 4]]
    monkeypatch.undo()
    images._register_plugins.cache_clear()


def test_a_message_names_the_first_five_and_counts_the_rest() -> None:
    errors = [UnreadableImageError(f"'{i}' is broken.") for i in range(7)]
    assert describe_unreadable(errors[:1], 9) == "'0' is broken."
    five = "7 of 9 images cannot be read. '0' is broken. '1' is broken. '2' is broken. '3' is broken. '4' is broken."
    assert describe_unreadable(errors, 9) == f"{five} And 2 more."
    assert issubclass(UnreadableImageError, UserError)
