"""DVC's pages of plots without a network: its own template loads Vega's scripts from a server, this one has them.

`python -m stages.charts .dvc/plots.html` writes it; `plots.html_template` in DVC's configuration names it.
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


def main() -> None:
    """Write the template, in which DVC fills in `{plot_divs}` and `{refresh_tag}`."""
    parser = argparse.ArgumentParser(prog="python -m stages.charts", description=main.__doc__)
    parser.add_argument("output", type=Path, help="HTML file to write")
    output = parser.parse_args().output
    # Without a snippet of one's own; the package's types are wrong.
    scripts = vl_convert.javascript_bundle(None)  # type: ignore[arg-type]
    # The end of a script's element, wherever it is, would end this one.
    write_text(output, _PAGE % scripts.replace("</script", "<\\/script"))


if __name__ == "__main__":
    run(main)
