import numpy as np
import pytest

from bids_varaug.brainage.morph import MorphError, MorphReader

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
    layout, read = MorphReader().read(tmp_path / "a.tsv")
    assert np.array_equal(read, volumes.astype(float))
    assert (layout.members, layout.structures) == (MEMBERS, STRUCTURES)


def test_tables_alike_share_a_layout_and_others_do_not(tmp_path, volumes):
    (tmp_path / "a.tsv").write_bytes(text(volumes))
    (tmp_path / "b.tsv").write_bytes(text(volumes * 2))
    (tmp_path / "c.tsv").write_bytes(text(volumes).replace(b"\t17\t", b"\t18\t"))
    reader = MorphReader()
    layouts = [reader.read(tmp_path / f"{name}.tsv")[0] for name in "abca"]
    assert layouts[0] is layouts[1] is layouts[3] and layouts[2].structures[0][0] == 18


def test_any_damage_is_told_or_changes_nothing_but_values(tmp_path, volumes):
    whole = text(volumes)
    path = tmp_path / "a.tsv"
    rng = np.random.default_rng(0)
    reader = MorphReader()
    path.write_bytes(whole)
    reader.read(path)  # so that the fast way is taken where it can be
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
            layout, read = reader.read(path)
        except MorphError:
            told += 1
            continue
        assert read.shape == (len(layout.members), len(layout.structures))
        assert len(layout.structures) == 2 and np.isfinite(read).all()
    assert told > 200
