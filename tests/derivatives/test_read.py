import numpy as np
import pytest

from bids_varaug.derivatives.io import MorphError, read_morph

MEMBERS = ("ieee", "mca01", "mca02")
STRUCTURES = ((17, "Left-Hippocampus"), (53, "Right-Hippocampus"))


def text(volumes):
    rows = [
        f"{member}\t{member[:4].rstrip('0')}\t{index}\t{name}\t{volumes[m, k]!r}\n"
        for m, member in enumerate(MEMBERS)
        for k, (index, name) in enumerate(STRUCTURES)
    ]
    return ("member\tfamily\tindex\tname\tvolume\n" + "".join(rows)).encode()


@pytest.fixture
def volumes():
    return np.random.default_rng(0).lognormal(8, 1, (3, 2)).round(3).astype(object)


def test_volumes_are_read_to_the_last_bit(tmp_path, volumes):
    (tmp_path / "a.tsv").write_bytes(text(volumes))
    read = read_morph(tmp_path / "a.tsv")
    assert np.array_equal(read.volumes, volumes.astype(float))
    assert (tuple(read.families), read.structures) == (MEMBERS, STRUCTURES)


def test_any_damage_is_told_or_changes_nothing_but_values(tmp_path, volumes):
    whole = text(volumes)
    path = tmp_path / "a.tsv"
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(400):
        data = bytearray(whole)
        at = int(rng.integers(len(data)))
        if rng.random() < 0.5:
            del data[at : at + int(rng.integers(1, 60))]
        else:
            data[at] = int(rng.integers(256))
        path.write_bytes(bytes(data))
        try:
            read = read_morph(path)
        except MorphError:
            told += 1
            continue
        assert read.volumes.shape == (len(read.families), len(read.structures))
        assert len(read.structures) == 2 and np.isfinite(read.volumes).all()
    assert told > 200


def test_a_member_that_found_no_brain_is_told(tmp_path, volumes):
    volumes[1] = 0.0
    (tmp_path / "a.tsv").write_bytes(text(volumes))
    with pytest.raises(MorphError, match="found no brain"):
        read_morph(tmp_path / "a.tsv")
