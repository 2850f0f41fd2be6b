"""Tables and arrays of the user's: what is read from them, and what is refused in one sentence."""

import builtins

import numpy as np
import pytest

from anynorm.apps.studies.data import Reading, load_data
from anynorm.apps.studies.files import read_file
from anynorm.errors import UserError

X = np.random.default_rng(0).normal(size=(30, 3)).round(3)
WORDS = np.array(["ham", "spam", "egg"])[np.arange(30) % 3]


def write_csv(path, header, columns, separator=","):
    lines = [header] if header else []
    lines += [separator.join(map(str, row)) for row in zip(*columns, strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_last_column_is_learned_and_may_be_text(tmp_path, separator):
    header = separator.join(["a", "b", "c", "kind"])
    source = write_csv(tmp_path / "t.csv", header, [*X.T, WORDS], separator)
    arrays = read_file(source)
    assert np.allclose(arrays.x, X)
    assert arrays.y.tolist() == WORDS.tolist()
    data = load_data(source)
    assert (data.kind, data.classes, data.about) == ("classes", 3, "3 classes (egg, ham, spam)")
    assert data.sample_shape == (3,)


def test_a_column_called_label_comes_before_the_last(tmp_path):
    arrays = read_file(write_csv(tmp_path / "t.csv", "a,Label,b,c", [X[:, 0], WORDS, X[:, 1], X[:, 2]]))
    assert arrays.y.tolist() == WORDS.tolist()
    assert np.allclose(arrays.x, X)


def test_columns_are_named_by_target(tmp_path):
    source = write_csv(tmp_path / "t.csv", "\ufeffa,b,c,kind", [*X.T, np.arange(30) % 2])
    assert np.allclose(read_file(source, "a").y, X[:, 0])
    both = load_data(source, Reading(target="a, c"))
    assert (both.kind, both.classes, both.sample_shape) == ("values", 2, (2,))


def test_without_names_columns_have_numbers(tmp_path):
    source = write_csv(tmp_path / "t.csv", "", [*X.T, np.arange(30) % 2])
    assert len(read_file(source).x) == 30
    assert np.allclose(read_file(source, "1").y, X[:, 0])


def test_parquet_is_read_as_csv_is(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra: pip install 'anynorm[files]'")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"a": X[:, 0], "b": X[:, 1], "y": WORDS, "c": X[:, 2]}), tmp_path / "t.parquet")
    arrays = read_file(str(tmp_path / "t.parquet"))
    assert np.allclose(arrays.x, X)
    assert arrays.y.tolist() == WORDS.tolist()


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'anynorm\[files\]'"):
        read_file(str(tmp_path / "t.parquet"))


BAD = {
    "text in a feature": ("a,b,y", [X[:, 0], WORDS, WORDS], "", "column 'b' of", "holds 'ham'"),
    "an empty cell": ("a,b,y", [X[:, 0], ["", *X[1:, 1]], WORDS], "", "column 'b'", "1 cells that are empty"),
    "an unknown target": ("a,b,y", [*X[:, :2].T, WORDS], "z", "has no column 'z'; it has a, b, y", ""),
    "one column": ("y", [WORDS], "", "a column beside its target", ""),
    "a name twice": ("a,a,y", [*X[:, :2].T, WORDS], "", "two columns 'a'", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_end_in_one_sentence(tmp_path, case):
    header, columns, target, *said = BAD[case]
    with pytest.raises(UserError) as caught:
        read_file(write_csv(tmp_path / "t.csv", header, columns), target)
    message = str(caught.value)
    assert all(words in message for words in said)
    assert "\n" not in message
    assert message.startswith("compare --")


@pytest.mark.parametrize(
    ("text", "said"), [("", "is empty"), ("a,y\n1,2\n1\n", "line 3 has 1"), (b"\xff\xfe\x00", "UnicodeDecodeError")]
)
def test_files_that_are_no_table(tmp_path, text, said):
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        read_file(str(tmp_path / "t.csv"))


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_token_ids_stay_integers_only_where_asked(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50, (30, 7)).astype(np.uint8)
    source = save(tmp_path / "t.npz", x=ids, y=np.arange(30) % 2)
    data = load_data(source, Reading(tokens=True))
    assert data.holds_tokens
    rows = {tuple(row) for part in (data.train_x, data.validation_x, data.test_x) for row in part}
    assert rows == {tuple(row) for row in ids.astype(np.int64)}
    assert abs(load_data(source, Reading()).train_x.mean()) < 1e-5
    for bad in (ids - 100.0, ids + 0.5):
        with pytest.raises(UserError, match="--tokens: token ids must be whole"):
            load_data(save(tmp_path / "bad.npz", x=bad, y=np.arange(30) % 2), Reading(tokens=True))


@pytest.mark.parametrize("layout", ["N C L", "N L C", "N L"])
def test_padding_does_not_count_when_sequences_are_standardized(tmp_path, layout):
    generator = np.random.default_rng(1)
    lengths = np.array([9, *generator.integers(3, 10, 59)])
    x = generator.normal(size=(60, 9, 2)) * [1, 50] + [0, 7]
    x[np.arange(9) >= lengths[:, None]] = 1e6
    arrays = {"N L C": x, "N C L": x.transpose(0, 2, 1), "N L": x[..., 0]}[layout]
    data = load_data(save(tmp_path / "s.npz", x=arrays, y=np.arange(60) % 2, lengths=lengths), Reading())
    train = np.moveaxis(data.train_x, -1, 1) if layout == "N C L" else data.train_x
    real = np.arange(9) < data.lengths[0][:, None]
    assert np.allclose(train[real].mean(0), 0, atol=1e-5)
    assert np.allclose(train[real].std(0), 1, atol=1e-5)
    assert (train[~real] == 0).all()
    assert sorted(np.concatenate(data.lengths)) == sorted(lengths)


@pytest.mark.parametrize("lengths", [np.full(30, 8), np.full(30, 0), np.full(29, 3), np.full(30, 2.5)])
def test_lengths_that_do_not_fit(tmp_path, lengths):
    source = save(tmp_path / "s.npz", x=np.ones((30, 7)), y=np.arange(30) % 2, lengths=lengths)
    with pytest.raises(UserError, match="compare --data: lengths"):
        load_data(source, Reading())


def test_standardizing_can_be_left_out(tmp_path):
    source = save(tmp_path / "v.npz", x=X + 5, y=100 + X[:, 0])
    kept = load_data(source, Reading(standardize=False))
    assert kept.train_x.mean() > 4
    assert kept.train_y.mean() > 90
    usual = load_data(source, Reading())
    assert abs(usual.train_y.mean()) < 1e-5
    assert np.allclose(usual.train_y * usual.y_std[0] + usual.y_mean[0], kept.train_y, atol=1e-4)
    assert usual.fingerprint != kept.fingerprint
