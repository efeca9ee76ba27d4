"""A page that is whole in one file: no script, no other host, readable on paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .svg import DARK, LIGHT, STYLE, Picture, element, escaped

WIDE, NARROW = 760, 360  # pixels; of the two sizes in which a picture is drawn
BREAKPOINT = 600  # pixels; on a narrower screen the narrow picture is shown
PAGE_STYLE = f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
body{{margin:0 auto;padding:1rem;max-width:{WIDE}px;font:16px/1.5 system-ui,sans-serif;
color:var(--ink);background:var(--ground);overflow-wrap:anywhere}}
h1{{font-size:1.5rem;line-height:1.25}}
h2{{font-size:1.15rem;margin-top:2rem}}
figure{{margin:1.5rem 0}}
figcaption{{color:var(--soft);font-size:.9rem}}
svg.chart{{display:block;max-width:100%;height:auto}}
svg.narrow{{display:none}}
.scroll{{overflow-x:auto}}
.scroll:focus-visible{{outline:2px solid var(--main)}}
.scroll svg.chart{{max-width:none}}
table{{border-collapse:collapse;font-size:.85rem;overflow-wrap:normal;min-width:20rem}}
caption{{text-align:left;color:var(--soft);padding-bottom:.5rem}}
th,td{{padding:.3rem .5rem .3rem 0;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap;vertical-align:top}}
th[scope=col]{{white-space:normal;vertical-align:bottom}}
th:first-child,.words{{text-align:left}}
td.words{{white-space:normal;min-width:5rem}}
td.words:last-child{{min-width:14rem}}
pre{{padding:.8rem;border:1px solid var(--line);overflow-x:auto;white-space:pre-wrap}}
pre span{{display:block;padding-left:2rem;text-indent:-2rem}}
dt{{color:var(--soft);font-size:.9rem}}
dd{{margin:0 0 .5rem}}
@media (max-width:{BREAKPOINT}px){{svg.wide{{display:none}}svg.narrow{{display:block}}}}
@media print{{:root{{{LIGHT}}}figure,tr{{break-inside:avoid}}.scroll{{overflow:visible}}
.scroll svg.chart{{max-width:100%}}table{{font-size:.7rem}}
svg.wide{{display:block}}svg.narrow{{display:none}}}}
""".strip()


def page(title: str, *parts: str) -> str:
    """The page. `parts` are elements already."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{escaped(title)}</title>\n<style>\n{STYLE}\n{PAGE_STYLE}\n</style>\n",
            f"</head>\n<body>\n<main>\n{element('h1', text=title)}\n",
            *(f"{part}\n" for part in parts),
            "</main>\n</body>\n</html>\n",
        ]
    )


def figure(wide: Picture, narrow: Picture, caption: str) -> str:
    """A picture in two sizes, of which a screen shows what it has room for."""
    return element(
        "figure",
        wide.svg("wide"),
        narrow.svg("narrow"),
        element("figcaption", text=caption),
    )


def table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], words: frozenset[int]
) -> str:
    """A table whose first column names its rows; the columns `words` hold text, and are set to the
    left."""

    def cell(kind: str, text: str, number: int, **more: str) -> str:
        looks = {"class_": "words"} if number in words else {}
        return element(kind, text=text, **looks, **more)

    head = (cell("th", text, number, scope="col") for number, text in enumerate(heads))
    body = []
    for first, *rest in rows:
        cells = (cell("td", text, number) for number, text in enumerate(rest, start=1))
        body.append(element("tr", element("th", text=first, scope="row"), *cells))
    whole = element(
        "table",
        element("caption", text=caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    return scrolling(caption, whole)


def scrolling(label: str, inner: str) -> str:
    """What scrolls by itself where it is wider than the screen, by keyboard too."""
    return element("div", inner, class_="scroll", role="region", tabindex="0", aria_label=label)


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with their values."""
    return element("dl", *(element("dt", text=a) + element("dd", text=b) for a, b in pairs))


def code(lines: Iterable[str]) -> str:
    """Lines as they are typed, each with what does not fit into it further in."""
    return element(
        "pre", element("code", *(element("span", text=text) for text in lines)), tabindex="0"
    )
