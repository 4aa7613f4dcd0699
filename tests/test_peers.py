"""The comparison with peers runs, counts, and finds its own sides exact."""

import json

import pytest

from benchmarks import peers, products
from open_mmicl import wide
from open_mmicl.errors import UsageError


def test_ours_batches_and_naive_agree(tmp_path, capsys) -> None:
    out = tmp_path / "report.json"
    argv = ["--sides", "ours,generic,batches", "--rounds", "1", "--anchors", "1", "--queries", "1", "--pool", "6"]
    assert peers.main([*argv, "--beams", "2", "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    for part in peers.PARTS:
        for side in ("generic", "batches"):
            row = report["parts"][part][side]
            assert row["same"] == 1 and row["max_log_prob_difference"] < 1e-4 and row["times_ours"] > 0
        ours = report["parts"][part]["ours"]
        assert ours["times_ours"] == 1 and 0 < ours["fewest_tokens"] < ours["naive_tokens"]
        assert ours["fewest_tokens"] <= ours["tokens"]
    assert "(a) InfoScore beam search" in capsys.readouterr().out


def test_what_cannot_be_compared_is_named(monkeypatch, capsys) -> None:
    for argv in (["--sides", "ours,sglang"], ["--sides", "naive"]):
        with pytest.raises(UsageError, match="--sides"):
            peers.main(argv)
    with pytest.raises(SystemExit):
        peers.main(["--pool", "2"])
    assert "--pool: '2' is not a whole number from 4" in capsys.readouterr().err


@pytest.mark.skipif(not wide.has_onednn(), reason="this build of torch has no oneDNN")
def test_products_are_compared_by_rows_and_by_layer(capsys) -> None:
    assert products.main(["--rows", "2,3", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 5 and [line.split()[2] for line in lines if "the layer" in line] == ["2", "3"]
    with pytest.raises(SystemExit):
        products.main(["--rows", "2,x"])
    assert "--rows" in capsys.readouterr().err
