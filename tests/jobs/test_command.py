"""The command line: light, one sentence for a mistake, and every recipe reads back."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from bixse.place import Place
from jobs.command import RECIPES, parse
from jobs.pipeline import _doc_ids
from jobs.recipe import Recipe
from jobs.verbs import VERBS, _sentence, main

ROOT = Path(__file__).resolve().parent.parent.parent


def command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_reads_back_from_its_json(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert parse("pipeline", [name, "--out", "x"]).recipe == recipe


def test_a_flag_changes_its_value_and_nothing_else() -> None:
    changed = parse("train", ["bixse", "--out", "x", "--training.learning-rate", "1e-3"]).recipe
    plain = RECIPES["bixse"]()
    assert changed.training.learning_rate == 1e-3
    rate = plain.training.learning_rate
    assert changed.replace(training=changed.training.replace(learning_rate=rate)) == plain


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["bixse"], "--out"),
        (["bixs", "--out", "x"], "the nearest is 'bixse'"),
        (["bixse", "--out", "x", "--training.learning-rat", "1"], "--training.learning-rate"),
        (["bixse", "--out", "x", "--training.epochs", "many"], "--training.epochs"),
        (["bixse", "--out", "x", "--training.epochs", "0"], "greater than or equal to 1"),
        (["bixse", "--out", "x", "--judging.judge", "oracle"], "'human', 'features', 'vllm'"),
        (["bixse", "--out", "x", "--training.learning-rate", "nan"], "training"),
        (["bixse", "--out", ""], "--out is empty"),
        (["bixse", "--out", "x", "--data="], "--data is empty"),
        (["--data", "d", "--out", "x"], "the recipe comes before the flags"),
        (["bixse", "--out", "x", "--dat", "d"], "the nearest is --data\n"),
        (["bixse", "--output", "x"], "the nearest is --out\n"),
        (["bixse", "--out", "x", "--learning-rate", "1"], "--training.learning-rate\n"),
        (["bixse", "--out", "x", "--training.batch-size", "-3"], "than or equal to 2, found -3\n"),
        (["bixse", "--out", "x", "--truncate", "0"], "error: --truncate: Input should be greater"),
        (["bixse", "--out", "x", "--judging.judge", "neighbours"], "and theirs alone\n"),
        (["bixse", "--out", "x", "--judging.max-cost", "1"], "needs judging.price_per_gpu_hour\n"),
        (
            ["bixse", "--out", "x", "--judging.max-cost", "1", "--judging.judge", "openai"],
            "needs judging.openai.price_per_million_prompt_tokens, or of output tokens\n",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse("train", words)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert problem in captured.err


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, jobs.verbs\n"
        "try:\n    jobs.verbs.main('train', ['bixse', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'faiss'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "--training.learning-rate" in done.stdout
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("verb", ["pipeline", "train"])
def test_list_shows_every_recipe(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(verb, ["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_answers_for_itself(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file is run as `python -m` runs it, in an interpreter that has imported everything."""
    monkeypatch.setattr(sys, "argv", [verb, "bixse", "--outt", "x"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "jobs" / f"{verb}.py"), run_name="__main__")
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--out" in said


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    data = tmp_path / "corpus.jsonl"
    data.write_text('{"_id": "1", "text": "one"}\n')
    out = str(tmp_path / "out")
    done = command("jobs.ingest", "bixse", "--data", str(data), "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 1


def test_ids_to_delete_are_the_lines_of_a_file(tmp_path):
    """Of one that began with a byte order mark the first id was not in the index."""
    path = tmp_path / "ids"
    path.write_bytes("\ufeffd/1\r\n\r\n  d 2 \nñ\u2028x\n".encode())
    assert _doc_ids(str(path)) == {"d/1", "d 2", "ñ\u2028x"}
    assert _doc_ids(None) == frozenset()
    # As --data and --base-index may be, it may be elsewhere.
    Place("memory://deletes").write("ids", path.read_bytes())
    assert _doc_ids("memory://deletes/ids") == {"d/1", "d 2", "ñ\u2028x"}
    path.write_bytes("d1\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"/ids is not UTF-8 text$"):
        _doc_ids(str(path))
    with pytest.raises(ValueError, match=r"cannot read .*/absent: No such file"):
        _doc_ids(str(tmp_path / "absent"))


STARTS_RAY = """
import ctypes, os, signal, sys, time
from jobs import verbs
from jobs.cluster import start_ray

def embed(pipeline):
    start_ray()
    # What Ray's threads do to a process that leaves at a bad moment.
    libc = ctypes.CDLL(None)
    libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
    if "told" in sys.orig_argv:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    return {"verb": "embed"}

verbs.VERBS["embed"] = embed
sys.argv = ["embed", "bixse", "--out", "nowhere", "--json"]
verbs.program("embed")
"""


@pytest.mark.parametrize(("told", "status"), [(False, 0), (True, 143)])
def test_a_job_ends_with_its_own_status(told: bool, status: int) -> None:
    """Ray's own handler of SIGTERM ended it with status 15 and without a word. On a loaded machine
    it was aborted: three seconds after SIGTERM, or by threads of Ray's as it left."""
    line = [sys.executable, "-c", STARTS_RAY, *(["told"] if told else [])]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stderr
    said = "error: terminated: the same command goes on from the finished parts"
    assert done.stderr.splitlines() == ([said] if told else [])
    assert done.stdout == ("" if told else '{"verb": "embed"}\n')


def test_a_bucket_without_its_package_says_what_to_install() -> None:
    missing = ModuleNotFoundError("No module named 's3fs'", name="s3fs")
    error = ImportError("Install s3fs to access S3")
    error.__cause__ = missing
    assert "pip install -e '.[cloud]'" in _sentence(error)
