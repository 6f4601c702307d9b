"""The commands of README, CONTRIBUTING and docs/: those that sample are run, the bundled model's are those of its
scripts, and all others name programs, flags and settings that there are. What else these pages name is there too."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hart_jax.config import read_experiment, split_config
from hart_jax.errors import UserError

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
SCRIPTS = ("make_bundled_model.sh", "evaluate_bundled_model.sh")
# Beside programs of ours: what sets up a shell or hands a command on.
SHELL = ("source ", "export ", "gcloud ", "scontrol ", "cd ", "[ ", "#!", "#SBATCH")
# What refuses a folder that exists.
MAKES_A_FOLDER = ("hart_jax.checkpoints.export", "hart_jax.checkpoints.convert")


def on_one_line(text: str) -> str:
    return re.sub(r"\\\n\s*", "", text)


def lines_of(page: Path) -> list[str]:
    """The lines of a page's shell blocks, and the commands within its sentences."""
    text = re.sub(r"^ +(?=\S)", "", page.read_text(), flags=re.MULTILINE)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shell = [body for language, body in blocks if language == "bash" or (not language and body.startswith("python "))]
    lines = [re.split(r"\s+# ", line)[0].strip() for body in shell for line in on_one_line(body).splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    # A name alone is no command.
    named = [span for span in spans if re.match(r"(python|pip|make|scripts/\S+\.sh) ", span)]
    return [line for line in lines if line and not line.startswith("# ")] + named


def commands_in(line: str) -> list[str]:
    """The commands of a line: behind variables and launchers, and apart where && joins them."""
    parts = [part.strip(" '&") for part in line.split(" && ")]
    return [re.sub(r"^(\w+=\S+ |srun )+", "", part) for part in parts]


COMMANDS = sorted({(page.name, command) for page in PAGES for line in lines_of(page) for command in commands_in(line)})
RUN_HERE = ("python sample.py --config=configs/emoji", "python sample.py --checkpoint=assets/emoji")
SAMPLING = sorted({command for _, command in COMMANDS if command.startswith(RUN_HERE) and "--help" not in command})


def test_commands_are_found():
    pages = {name for name, _ in COMMANDS}
    assert {"README.md", "CONTRIBUTING.md", "sampling.md", "training.md", "evaluation.md", "bundled_model.md"} <= pages
    assert len(SAMPLING) >= 2


# Of one image each: the tests of every change run them.
OFTEN = [command for command in SAMPLING if "--num_images" not in command and "--prompts_file" not in command]


@pytest.mark.parametrize(
    "command", [pytest.param(each, marks=() if each in OFTEN else pytest.mark.slow) for each in SAMPLING]
)
def test_sampling_commands_run(command, tmp_path):
    arguments = [part for part in shlex.split(command)[2:] if not part.startswith("--out=")]
    run = run_python("sample.py", *arguments, f"--out={tmp_path}")
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_snippets_of_the_api_run():
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL):
        shapes = re.findall(r"^(\w+) = .*  # .*?(\(\d[\d, ]*\))", snippet, re.MULTILINE)
        assert shapes
        run = run_python("-c", snippet + "".join(f"\nprint({name}.shape)" for name, _ in shapes))
        assert run.stdout.split("\n")[: len(shapes)] == [shape for _, shape in shapes], run.stderr


def test_the_notebook_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    run = run_python("-c", snippet + "\nprint(images.shape, images.dtype)")
    assert run.stdout.strip() == re.sub(r"uint8 (\(.*\))", r"\1 uint8", snippet.rsplit("# ", 1)[1].strip()), run.stderr


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_bundled_model_is_made_by_its_script():
    made, measured = (on_one_line((ROOT / "scripts" / name).read_text()) for name in SCRIPTS)
    page = (ROOT / "docs" / "bundled_model.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = block.splitlines()
    for command in commands:
        # The script's folder is another where OUT says so.
        start = re.sub(r"--out models/\w+$", "--out ", command)
        assert start in made, command
    assert len(commands) == len(re.findall(r"^(?:\[.*\|\| )?(?:python|pip) ", made, re.MULTILINE))
    (scores,) = re.findall(r"(?<=\n)python evaluate\.py.*", on_one_line((ROOT / "docs" / "evaluation.md").read_text()))
    start, _ = scores.split("--out=")
    assert start in measured


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_names_what_there_is(page, command):
    check(command)


@pytest.mark.parametrize(
    "wrong",
    [
        "rm -rf data",
        "make nonsense",
        "python nowhere.py",
        "python -m hart_jax.convert --source RELEASED --out models/x",
        "python -m hart_jax.checkpoints.export --workdir runs/emoji_hart --out assets/emoji",
        "python sample.py --config=configs/emoji_hart.py --promt=x",
        "python train.py --config=configs/nowhere.py --workdir=x",
        "python train.py --config=configs/emoji_hart.py --config.train.stepz=3 --workdir=x",
        "python train.py --config=configs/emoji_hart.py:stage=5 --workdir=x",
        "python train.py --config.train.stepz=3",
        "python evaluate.py --what=pictures --picture=x",
        'pip install -e ".[cuda]"',
        'pip install "hart_jax[cuda]"',
        "scripts/nowhere.sh",
    ],
)
def test_what_is_not_there_is_found(wrong):
    with pytest.raises((AssertionError, UserError)):
        check(wrong)


def check(command: str) -> None:
    """Fails for a command whose program, flags, settings, extra or target there are not."""
    words = shlex.split(command.replace("...", "x"))
    if command.startswith(SHELL):
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif words[0] == "pip":
        check_pip(words)
    elif words[0] == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    elif words[0].startswith("scripts/"):
        assert os.access(ROOT / words[0], os.X_OK), command
    else:
        assert words[0] == "python", f"{command!r}: what tests that?"
        check_python(words[1:])


def check_pip(words: list[str]) -> None:
    extras = re.findall(r"\[([\w-]+)\]", words[-1])
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= set(known), words
    if words[1] == "download":
        assert any(" ".join(words) in (ROOT / "scripts" / name).read_text() for name in SCRIPTS), words
    else:
        assert extras or words[2:] == ["pre-commit"], words


def check_python(words: list[str]) -> None:
    module, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if module == "pytest":
        paths = [word for word in rest if word.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths), words
        return
    source = source_of(module, is_module=words[0] == "-m")
    flags = [word[2:].split("=")[0] for word in rest if word.startswith("--")]
    known = set(re.findall(r"(?:DEFINE_\w+|add_argument)\(\s*\"(?:--)?(\w+)\"", source.read_text()))
    if "hart_flags" in source.read_text() or "flags.experiment" in source.read_text():
        known |= {"config", "help"}
    overrides = {flag.removeprefix("config.") for flag in flags if flag.startswith("config.")}
    own = {flag for flag in flags if not flag.startswith("config.")}
    # absl's flags for yes and no.
    assert all(flag in known or flag.removeprefix("no") in known for flag in own), f"{words}: knows {sorted(known)}"
    configs = [value for word in words for value in re.findall(r"configs/\w+\.py(?::[\w=]+)?", word)]
    assert all((ROOT / split_config(config)[0]).is_file() for config in configs), words
    for config in configs or (["configs/emoji_hart.py"] if overrides else []):
        check_settings(config, overrides)
    if module in MAKES_A_FOLDER and "--out" in rest:
        assert not (ROOT / rest[rest.index("--out") + 1]).exists(), f"{words}: refuses, as its --out is there"


def source_of(module: str, is_module: bool) -> Path:
    if not is_module:
        assert (ROOT / module).is_file(), module
        return ROOT / module
    path = ROOT / module.replace(".", "/")
    found = [file for file in (path.with_suffix(".py"), path / "__main__.py") if file.is_file()]
    assert found, module
    if "add_argument" not in (text := found[0].read_text()) and (again := re.search(r"from (\S+) import main", text)):
        return ROOT / (again[1].replace(".", "/") + ".py")
    return found[0]


def check_settings(config: str, names: set[str]) -> None:
    known = read_experiment(ROOT / config).names()
    for name in names:
        assert name in known, f"{config} has no setting {name}"


def defined_in(path: Path) -> set[str]:
    """Names of the functions and classes of a file, methods as Class.method."""

    def names(node: ast.AST, prefix: str = "") -> set[str]:
        found = set()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    found |= names(child, f"{prefix}{child.name}.")
        return found

    return names(ast.parse(path.read_text()))


@pytest.mark.parametrize(("page", "least"), [("architecture.md", 30), ("changing_things.md", 18)])
def test_a_page_names_functions_that_there_are(page, least):
    rows = re.findall(r"\| `([\w.]+)` \| `([\w/.]+\.py)` \|", (ROOT / "docs" / page).read_text())
    assert len(rows) > least
    missing = [(name, path) for name, path in rows if name not in defined_in(ROOT / path)]
    assert not missing


def test_the_architecture_has_every_room_at_its_level():
    """The levels are those of the import contract."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    level = {name.removesuffix(".py"): int(at) for at, name in re.findall(r"\| (\d) \| `([\w.]+)` \|", text)}
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [layer.split(" | ") for layer in reversed(contract["layers"])]
    assert level == {name: at for at, layer in enumerate(layers) for name in layer}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    folders = "hart_jax|pallas_kernels|tests|scripts|benchmarks|configs|assets|notebooks"
    named = re.findall(rf"`((?:{folders})/[\w/.*-]+)`", page.read_text())
    for name in named:
        # One that the reader is to choose.
        if "NAME" in name:
            continue
        assert list(ROOT.glob(name.rstrip("/"))), f"{page.name} names {name}"
