"""Deleting images over HTTP: into the trash, and back; files that are not ours stay."""

from pathlib import Path

from PIL import Image

from cascadekit.runtime.images.png import save_png
from cascadekit.runtime.ui.http_server import PageServer
from helpers.page import call


def names(server: PageServer, search: str = "") -> list[str]:
    return [image["name"] for image in call(server, "GET", f"/api/images?search={search}").json["images"]]


def test_an_image_is_deleted_and_comes_back(served: PageServer, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for number in range(2):
        save_png(folder / f"{number:04d}.png", Image.new("RGB", (8, 8)), {"prompt": f"number {number}", "seed": 7})
    content = (folder / "0000.png").read_bytes()
    deleted = call(served, "POST", "/images/0000.png/delete", {})
    assert deleted.status == 200
    assert names(served) == ["0001.png"]
    assert (folder / "trash" / "0000.png").read_bytes() == content
    assert call(served, "POST", "/images/0000.png/delete", {}).status == 404
    undo = f"/api/trash/{deleted.json['restore']}/restore"
    assert call(served, "POST", undo, {}).json == {"name": "0000.png"}
    assert sorted(names(served)) == ["0000.png", "0001.png"]
    assert (folder / "0000.png").read_bytes() == content
    assert call(served, "POST", undo, {}).status == 404


def test_nothing_is_replaced_in_the_trash_or_on_the_way_back(served: PageServer, tmp_path: Path) -> None:
    folder, tokens = tmp_path / "images", []
    for colour in ("red", "green", "blue"):
        save_png(folder / "0000.png", Image.new("RGB", (8, 8), colour), {"prompt": colour})
        tokens.append(call(served, "POST", "/images/0000.png/delete", {}).json["restore"])
    assert len(list((folder / "trash").iterdir())) == 3
    back = [call(served, "POST", f"/api/trash/{token}/restore", {}).json["name"] for token in tokens]
    assert back == ["0000.png", "0000-1.png", "0000-2.png"]
    assert [Image.open(folder / name).getpixel((0, 0)) for name in back] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def test_only_images_of_ours_are_deleted(served: PageServer, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    save_png(tmp_path / "outside.png", Image.new("RGB", (8, 8)), {"prompt": "x"})
    Image.new("RGB", (8, 8)).save(folder / "photo.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    for name in ("photo.png", "link.png", "../outside.png", "..%2foutside.png", "%2e%2e/outside.png", "trash.png"):
        assert call(served, "POST", f"/images/{name}/delete", {}).status == 404, name
    assert call(served, "POST", "/images/photo.png/delete", {}, Origin="http://evil.example").status == 403
    assert call(served, "GET", "/images/photo.png/delete").status == 405
    assert {path.name for path in folder.iterdir()} == {"photo.png", "link.png"}
    assert (tmp_path / "outside.png").exists()


def test_the_gallery_is_searched_by_words(served: PageServer, tmp_path: Path) -> None:
    for number, (prompt, negative) in enumerate([("A red Barn", ""), ("a red car", "barn"), ("the sea", "")]):
        settings = {"prompt": prompt, "negative": negative, "seed": 1000 + number}
        save_png(tmp_path / "images" / f"{number:04d}.png", Image.new("RGB", (8, 8)), settings)
    assert names(served, "barn+RED") == ["0001.png", "0000.png"]
    assert names(served, "1002") == names(served, "0002") == ["0002.png"]
    assert names(served, "boat") == []
    assert call(served, "GET", f"/api/images?search={'x' * 1001}").status == 400
