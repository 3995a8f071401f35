"""DVC's page of plots without a network."""

import re
import sys
from pathlib import Path

import pytest
from dvc_render.html import HTML
from dvc_render.vega import VegaRenderer

from stages import charts
from stages.common.cli import run


def test_the_plots_page_works_offline_and_has_its_charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["charts", str(tmp_path / "plots.html")])
    with pytest.raises(SystemExit) as exit_info:
        run(charts.main)
    assert exit_info.value.code == 0
    template = (tmp_path / "plots.html").read_text()
    assert template.count("{plot_divs}") == template.count("{refresh_tag}") == template.count("</script") == 1
    page = HTML(template).with_scripts(VegaRenderer.SCRIPTS).with_element("<div id='chart'></div>").embed()
    assert "<div id='chart'></div>" in page
    assert "window.vegaEmbed=" in page
    without = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<(script|link|img)\b", without)
    assert "cdn.jsdelivr.net/npm/vega@5.20.2" not in page
