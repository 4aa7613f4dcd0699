"""Tables of one's own: which column of a parquet file holds the pictures, what parts the columns of a CSV."""

from pathlib import Path

import pytest

from lever_plus import config, paths
from lever_plus.data.dataset import load_split
from lever_plus.data.readers import read_csv
from lever_plus.settings.loading import load
from lever_plus.settings.shared import SharedSettings
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("form", ["bytes", "struct"])
@pytest.mark.parametrize(
    ("columns", "arguments", "wanted"),
    [(["image"], {}, "image"), (["pic"], {}, "pic"), (["pic"], {"image": "pic"}, "pic"),
     (["image", "mask"], {}, "image"), (["pic", "mask"], {"image": "mask"}, "mask")],
)  # fmt: skip
def test_the_column_of_pictures_is_found(
    form: str, columns: list[str], arguments: dict[str, str], wanted: str, tmp_path: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from lever_plus.data.parquet import read_parquet

    row = {name: PNG + name.encode() for name in columns}
    row = {name: value if form == "bytes" else {"bytes": value, "path": None} for name, value in row.items()}
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "question": "q"}]), tmp_path / "a.parquet")
    ((_, read),) = read_parquet(tmp_path / "a.parquet", tmp_path / "images", **arguments)
    name = read["image" if "image" not in columns else wanted]
    assert (tmp_path / "images" / name).read_bytes() == PNG + wanted.encode()
    with pytest.raises(UsageError, match="image='photo' is none of its columns: "):
        list(read_parquet(tmp_path / "a.parquet", tmp_path / "images", image="photo"))


def test_pictures_that_are_names_are_looked_for_in_the_data_sets_own_folder(tmp_path: Path, monkeypatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"image": f"{i}.png", "question": "q", "answer": "a"} for i in range(9)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    monkeypatch.setattr(config, "config_dirs", lambda kind: [tmp_path])
    (tmp_path / "mine.yaml").write_text("reader: parquet\nfiles: '{root}/*.parquet'\npath_variable: MY_OWN_PATH\n")
    values = {"DATASET": "mine", "RESULT_DIR": str(tmp_path / "r"), "MY_OWN_PATH": str(tmp_path)}
    with pytest.raises(MissingInputError, match="set MY_OWN_PATH to the folder above it"):
        load_split(paths.dataset(load(SharedSettings, values, {})), "train").image_path(0)


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_columns_that_something_else_parts_are_told(mark: str, tmp_path: Path) -> None:
    file = tmp_path / "q.csv"
    file.write_text(mark.join(["image", "question", "answer"]) + "\n" + mark.join("abc") + "\n")
    with pytest.raises(DamagedInputError, match=r"q\.csv: line 1 is one name.*reader_args: {delimiter: "):
        list(read_csv(file))
    assert [record for _, record in read_csv(file, mark)] == [{"image": "a", "question": "b", "answer": "c"}]
