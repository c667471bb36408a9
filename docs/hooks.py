"""What mkdocs makes of the repository when it builds the site (`make docs`), so that no page goes stale.

README.md becomes the page of tasks, data_prep/README.md that of data sets, lrface/shipped/README.md that of the model
inside, a page for each command comes from its help,
and the tutorial is run and shown with what it gave. Nothing here loads anything over a network.
"""

import base64
import html
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LOG = logging.getLogger("mkdocs.hooks.lrface")
README, DATA_PREP, SHIPPED, TUTORIAL = "tasks.md", "data_prep.md", "shipped.md", "tutorial.md"
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>~?([\w.]+)</code>")

_executing = False


def on_startup(command: str, dirty: bool) -> None:
    """`mkdocs serve` shows the tutorial without running it."""
    global _executing
    _executing = command == "build"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every command, and every page that mkdocs.yml does not name (as a guide), is in the navigation."""
    assert config.nav is not None
    named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    guides = next(section["Guides"] for section in config.nav if "Guides" in section)
    guides += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in named]
    commands: list[Any] = ["commands/index.md"]
    commands += [{f"lrface {name}": page_of(name)} for name, _ in all_commands()]
    config.nav.append({"Commands": commands})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages: dict[str, str | bytes] = {**task_pages(), **command_pages(), **tutorial()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The start of the site begins as README.md does."""
    if page.file.src_uri != "index.md":
        return markdown
    return markdown.replace("<!-- README -->", rewritten(readme()[0]))


def on_page_content(content: str, **_: Any) -> str:
    """Docstrings name objects as Sphinx has it; here they become links where the object has a place."""
    content = ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', content)
    return content.replace("::</p>", ":</p>")


# ------------------------------------------------------------------------------------------------------- README.md


def readme() -> tuple[str, str]:
    """README.md without its title: what stands before its first section, and the sections."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("\n", 1)[1]
    start, _, sections = text.partition("\n## ")
    return start, f"## {sections}"


def rewritten(text: str) -> str:
    """Links of README.md as they are from docs/; what has no page here is named only."""

    def link(match: re.Match[str]) -> str:
        target = match[2].removeprefix("../../").replace("data_prep/README.md", DATA_PREP)
        target = target.replace("lrface/shipped/README.md", SHIPPED)
        target = target.removeprefix("docs/").replace("tutorial.ipynb", TUTORIAL)
        if target in (DATA_PREP, SHIPPED, TUTORIAL) or (ROOT / "docs" / target.partition("#")[0]).exists():
            return f"{match[1]}({target})"
        return match[0] if re.match(r"https?:|#", target) else match[1].lstrip("!").strip("[]")

    return re.sub(r"(!?\[[^\]\n]*\])\(([^)\s]+)\)", link, text)


def task_pages() -> dict[str, str]:
    data_prep = (ROOT / "data_prep" / "README.md").read_text(encoding="utf-8")
    shipped = (ROOT / "lrface" / "shipped" / "README.md").read_text(encoding="utf-8")
    return {
        README: f"# Tasks\n\n{rewritten(readme()[1])}",
        DATA_PREP: rewritten(data_prep),
        SHIPPED: rewritten(shipped),
    }


# --------------------------------------------------------------------------------------------------------- commands


def all_commands() -> Iterator[tuple[str, Any]]:
    """("data info", its click command) and so on."""
    import typer

    from lrface.cli import app

    def below(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, child in getattr(command, "commands", {}).items():
            if hasattr(child, "commands"):
                yield from below(child, (*path, name))
            elif not child.hidden:
                yield " ".join((*path, name)), child

    return below(typer.main.get_command(app), ())


def page_of(command: str) -> str:
    return f"commands/{command.replace(' ', '-')}.md"


def command_pages() -> dict[str, str]:
    """A page for each command, and one that lists them."""
    listed = ["# Commands", "", "What `lrface COMMAND --help` says.", "", "| command | |", "|---|---|"]
    pages = {}
    for name, command in all_commands():
        context = command.context_class(command, info_name=f"lrface {name}")
        text = in_markdown((command.help or "").replace("\\[", "["))
        sentence = re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
        usage = command.get_usage(context).removeprefix("Usage: ")
        lines = [f"# lrface {name}", "", "```text", usage, "```", "", text, "", "| option | |", "|---|---|"]
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                lines.append(f"| {cell(f'`{record[0]}`')} | {cell(in_markdown(record[1]))} |")
        pages[page_of(name)] = "\n".join(lines) + "\n"
        file = page_of(name).removeprefix("commands/")
        listed.append(f"| [lrface&nbsp;{name.replace(' ', '&nbsp;')}]({file}) | {cell(sentence)} |")
    return {"commands/index.md": "\n".join(listed) + "\n", **pages}


def in_markdown(text: str) -> str:
    """Plain text whose only markup is `code`."""
    parts = re.split(r"(`[^`]*`)", text.strip())
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", html.escape(part, quote=False))
        for part in parts
    )


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# --------------------------------------------------------------------------------------------------------- tutorial


def tutorial() -> dict[str, str | bytes]:
    """docs/tutorial.ipynb as a page and the pictures that it drew."""
    import nbformat

    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    if _executing:
        LOG.info("Running the tutorial")
        run(notebook)
    lines: list[str] = []
    pictures: dict[str, str | bytes] = {}
    for each in notebook.cells:
        if each.cell_type == "markdown":
            lines += [each.source, ""]
            continue
        lines += ["```python", each.source, "```", ""]
        for output in each.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"tutorial_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                lines += [f"![What the code above draws]({name})", ""]
            elif text := output.get("text") or data.get("text/plain"):
                lines += ["```text", text.rstrip(), "```", ""]
    return {TUTORIAL: "\n".join(lines), **pictures}


def run(notebook: Any) -> None:
    """Execute every cell in a folder of its own; the outputs are in ``notebook`` then.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import tempfile

    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    # This interpreter, whether or not anybody has registered it as a kernel.
    manager = AsyncKernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        env={
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, km=manager, timeout=3600, startup_timeout=600, resources={"metadata": {"path": folder}}
        )
        client.execute(cleanup_kc=True)
