"""DVC's pages of plots without a network: a template with Vega's scripts in it.

`python -m stages.report.charts .dvc/plots.html` writes it; `plots.html_template` in DVC's configuration names it. DVC's
own template loads the scripts from a server.
"""

import argparse
from pathlib import Path

import vl_convert

from stages.common.cli import run
from stages.common.files import write_text

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>DVC plots</title>
{refresh_tag}
<script>%s</script>
<style>table { border-spacing: 15px; } body { font-family: sans-serif; }</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def make_template() -> str:
    """Return a template for `plots.html_template`: DVC fills in `{plot_divs}` and `{refresh_tag}`."""
    # Without a snippet of one's own; the package's types are wrong.
    scripts = vl_convert.javascript_bundle(None)  # type: ignore[arg-type]
    # The end of a script's element, wherever it is, would end this one.
    return _PAGE % scripts.replace("</script", "<\\/script")


def main() -> None:
    """Write the template."""
    parser = argparse.ArgumentParser(prog="python -m stages.report.charts", description=main.__doc__)
    parser.add_argument("output", type=Path, help="HTML file to write")
    write_text(parser.parse_args().output, make_template())


if __name__ == "__main__":
    run(main)
