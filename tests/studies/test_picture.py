"""The README's picture."""

import re

from studies import picture
from tests.helpers.distributed import ROOT


def test_the_shipped_picture_says_what_the_script_draws(tmp_path, capsys):
    assert picture.main([str(tmp_path / "moe2dense")]) == 0
    shipped = ROOT / "docs/images/moe2dense.svg"
    # The words stand as comments beside their outlines, which change a little between Matplotlib versions.
    drawn, kept = (re.findall("<!-- (.*?) -->", path.read_text()) for path in (tmp_path / "moe2dense.svg", shipped))
    assert drawn == kept
    assert "router" in drawn
    assert capsys.readouterr().out.split() == [str(tmp_path / "moe2dense.png"), str(tmp_path / "moe2dense.svg")]


def test_the_picture_script_says_how_it_is_called(capsys):
    assert picture.main([]) == 2
    assert "usage" in capsys.readouterr().err
