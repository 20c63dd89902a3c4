"""Files as users have them: what can be read is, and what cannot is named."""

import json

import pytest

from jaxtp import files


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_is_read_without_a_byte_order_mark(tmp_path, mark):
    path = tmp_path / "a.txt"
    path.write_bytes(mark + "ü\r\n😀".encode())
    assert files.read_text(path) == "ü\r\n😀"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("é".encode("latin1"), r":1 is not UTF-8 text \(byte 0xe9\)"),
        (b"a\n\xff\n", r":2 is not UTF-8"),
        ("hi".encode("utf-16"), "UTF-16"),
        (b"\x1f\x8b\x08", r"compressed \(gzip\); unpack it first: gunzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\x03\x04", "zip"),
    ],
)
def test_other_encodings_and_compressed_files_are_refused_by_name(tmp_path, content, said):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.txt.*{said}|a\.txt{said}"):
        files.read_text(tmp_path / "a.txt")


def test_lines_end_at_newlines_alone():
    inside = "a\u2028b\u0085c\x0bd\x1ce"
    assert list(files.lines(f"{inside}\r\n\n{inside}")) == [(1, inside), (3, inside)]


@pytest.mark.parametrize(
    ("text", "said"),
    [("[", "not valid JSON"), ("[" * 100_000, "not valid JSON"), (r'{"a": ["\ud83d"]}', "surrogate"), ("", "valid")],
)
def test_broken_json_is_one_line_with_the_name(text, said):
    with pytest.raises(ValueError, match=said) as error:
        files.parsed(text, "x.json:3")
    assert str(error.value).startswith("x.json:3 ")
    assert "\n" not in str(error.value)


def test_pairs_of_surrogates_are_one_character():
    assert files.parsed(json.dumps("😀"), "x") == "😀"


@pytest.mark.parametrize("path", ["gs://bucket/a", "s3://bucket", "hf://org/name"])
def test_remote_addresses_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match="remote address"):
        files.local(path)
    assert files.local(tmp_path) == tmp_path
