import numpy as np
import pytest

from anynorm.apps.studies.data import load_data, split
from anynorm.errors import UserError


@pytest.mark.parametrize(
    ("name", "sizes", "shape"), [("mnist", (3500, 500, 1000), (1, 28, 28)), ("digits", None, (1, 8, 8))]
)
def test_splits_are_disjoint_stratified_and_repeatable(name, sizes, shape):
    data = load_data(name)
    assert data.sample_shape == shape
    parts = (data.train_y, data.validation_y, data.test_y)
    if sizes:
        assert tuple(map(len, parts)) == sizes
    for y in parts:
        counts = np.bincount(y, minlength=data.classes)
        assert counts.max() - counts.min() <= 0.05 * len(y)
        # Not in the order of the classes, as the files are.
        assert np.abs(np.diff(y)).mean() > 1
    rows = np.concatenate([x.reshape(len(x), -1) for x in (data.train_x, data.validation_x, data.test_x)])
    # Real data may hold twins; a split that put samples into two parts would show many more.
    assert len({row.tobytes() for row in rows}) >= 0.999 * len(rows)
    assert abs(data.train_x.mean()) < 1e-4
    assert abs(data.train_x.std() - 1) < 1e-3
    assert load_data(name).fingerprint == data.fingerprint


def test_columns_of_a_table_are_standardized_each(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 3)) * [1, 1000, 0] + [0, 5, 7]
    np.savez(tmp_path / "table.npz", x=x, y=np.arange(200) % 2 * 5)
    data = load_data(str(tmp_path / "table.npz"))
    assert data.classes == 2
    assert np.allclose(data.train_x.std(0), [1, 1, 0], atol=1e-3)


def test_another_label_is_another_fingerprint():
    x, y = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 3
    assert split("a", x, y).fingerprint != split("a", x, np.roll(y, 1)).fingerprint


X, Y = np.zeros((12, 4)), np.arange(12) % 3
FILES = {
    "no y": ({"x": X}, "holds x"),
    "no arrays": ({}, "holds none"),
    "one axis": ({"x": np.zeros(12), "y": Y}, "has shape (12,)"),
    "empty": ({"x": np.zeros((0, 4)), "y": np.zeros(0)}, "not empty"),
    "text": ({"x": np.full((12, 4), "a"), "y": Y}, "dtype <U1"),
    "objects": ({"x": np.array([[None] * 2] * 12), "y": Y}, "plain arrays"),
    "complex": ({"x": X.astype(complex), "y": Y}, "dtype complex128"),
    "nan": ({"x": np.where(np.eye(12, 4) > 0, np.nan, X), "y": Y}, "4 values that are NaN"),
    "too large": ({"x": X + 1e300, "y": Y}, "infinite"),
    "short y": ({"x": X, "y": Y[:-1]}, "shape (11,)"),
    "several columns": ({"x": X, "y": np.ones((12, 2))}, "shape (12, 2)"),
    "fractions": ({"x": X, "y": Y + 0.5}, "fractions"),
    "dates": ({"x": X, "y": Y.astype("datetime64[D]")}, "dtype datetime64"),
    "unknown y": ({"x": X, "y": np.where(Y > 1, np.nan, Y)}, "4 values that are NaN"),
    "lengths": ({"x": X, "y": Y, "lengths": np.ones(12)}, "only anynorm compare"),
    "one class": ({"x": X, "y": Y * 0}, "at least 2 classes"),
    "rare class": ({"x": X, "y": [7, 7] + [1] * 10}, "class 7"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_end_in_one_sentence(tmp_path, case):
    arrays, said = FILES[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError) as caught:
        load_data(str(tmp_path / "bad.npz"))
    message = str(caught.value)
    assert said in message
    assert message.startswith(("compare --data: ", "--data: "))
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 torn"])
def test_files_that_are_no_npz(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        load_data(str(tmp_path / "bad.npz"))


def test_a_plain_npy_is_no_npz(tmp_path):
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(UserError, match="--data"):
        load_data(str(tmp_path / "x.npy"))
