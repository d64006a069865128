"""What docs/security.md promises of the sources, the server and the report."""

import ast
import hmac
import json
import re
from pathlib import Path

import pytest

import airl_fast
from airl_fast.report.run import report_run
from fuzz import seeds

ROOT = Path(airl_fast.__file__).parent
SOURCES = sorted([*ROOT.rglob("*.py"), *(ROOT.parent / "kernels").rglob("*.py")])
FORBIDDEN = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "torch.load", "np.load",
    "numpy.load", "marshal.loads", "shelve.open", "os.system", "os.popen", "tempfile.mktemp",
    "yaml.unsafe_load", "yaml.full_load", "tarfile.open", "zipfile.ZipFile",
    "shutil.unpack_archive",
}  # fmt: skip


def calls(source):
    """Dotted names of what a source calls, with the keywords given."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def faults(source):
    found = []
    for name, keywords in calls(source):
        if name in FORBIDDEN:
            found.append(name)
        if keywords.get("shell", "False") != "False":
            found.append(f"{name}(shell=...)")
        if keywords.get("allow_pickle", "False") != "False":
            found.append(f"{name}(allow_pickle=...)")
        if keywords.get("trust_remote_code") == "True":
            found.append(f"{name}(trust_remote_code=True)")
        if name == "yaml.load" and keywords.get("Loader") != "_StrictLoader":
            found.append("yaml.load")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_unpickled_evaluated_unpacked_or_given_to_a_shell(path):
    assert faults(path.read_text("utf-8")) == []


def test_the_check_of_the_sources_sees_planted_faults():
    for planted in (
        "torch.load(f)", "eval(x)", "yaml.load(x, Loader=yaml.Loader)", "yaml.load(x)",
        "subprocess.run(c, shell=True)", "np.load(f, allow_pickle=True)",
        "m.from_pretrained(n, trust_remote_code=True)",
    ):  # fmt: skip
        assert faults(planted), planted
    assert faults("model.eval()\nre.compile('a')\nyaml.load(x, Loader=_StrictLoader)") == []


ATTACKS = (
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\" onload=\"alert(1)",
    "<!--", "]]>", "javascript:alert(1)", "\u202e\ud800\0",
)  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_texts_of_traces_are_never_markup_in_a_report(tmp_path, attack):
    """In every place where a text of somebody else comes into the page."""
    steps = [{**seeds.SCORED["steps"][0], "text": attack, "end": len(attack)}]
    tokens = {"ids": [1], "offsets": [[0, len(attack)]], "f": [0.5], "logp": [-1.0],
              "reward": [0.2]}  # fmt: skip
    beside = dict.fromkeys(("id", "title", "prompt", "group", "source"), attack)
    row = {**seeds.SCORED, **beside, "text": attack, "steps": steps, "tokens": tokens}
    plain = {**row, **dict.fromkeys(beside, "a"), "text": "a" * len(attack),
             "steps": [{**steps[0], "text": "a" * len(attack)}]}  # fmt: skip
    pages = []
    for name, values in (("attack", row), ("plain", plain)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "scores.jsonl").write_text(json.dumps(values))
        metrics = {"step": 1, "phase": "policy", "seconds": 1.0, values["title"]: 1.0}
        (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
        (folder / "config.yaml").write_text(json.dumps({"task": {"name": values["title"]}}))
        evaluation = {**seeds.REPORT[3][0], "title": values["title"], "notes": [values["title"]]}
        (folder / "eval.json").write_text(json.dumps(evaluation))
        report_run(
            folder / "page.html", folder=folder, scores=folder / "scores.jsonl",
            evaluation=folder / "eval.json", title=values["title"],
        )  # fmt: skip
        pages.append((folder / "page.html").read_text("utf-8"))
    assert tags(pages[0]) == tags(pages[1])


def tags(page):
    """The elements of a page and the attributes' names, in order."""
    from html.parser import HTMLParser

    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, tuple(name for name, _ in attributes)))

        def handle_comment(self, data):
            found.append(("comment", data))

    Reader().feed(page)
    return found


def test_the_page_lets_nothing_in_it_ask():
    """The policy in the page: no request, and no script but the one whose digest it names."""
    from airl_fast.report.page import _page

    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', _page("t", [], [], {}))[1]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
    assert "unsafe-eval" not in policy


def test_a_token_is_compared_in_constant_time(monkeypatch):
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    from airl_fast.serving import guard

    compared, real = [], hmac.compare_digest

    def compare(a, b):
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    admits = guard.Guard(None, token="s3cret", routes=frozenset(), on_arrival=lambda: None,
                         on_answer=lambda *_: None)._admits  # fmt: skip
    for value, admitted in ((b"Bearer s3cret", True), (b"Bearer s3cre", False), (b"", False)):
        assert admits({"headers": [(b"authorization", value)]}) == admitted
    assert [a for a, _ in compared] == [b"s3cret", b"s3cre", b""]
    assert not admits({"headers": [(b"authorization", b"Bearer s3cret")] * 2})  # one, or none


def test_a_wrong_token_file_does_not_show_its_token(tmp_path):
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    from airl_fast.serving.server import read_token

    file = tmp_path / "token"
    file.write_text("half-a-secret and-the-other-half")
    with pytest.raises(ValueError, match="expected a token") as raised:
        read_token(file)
    assert "half-a-secret" not in str(raised.value)


@pytest.mark.parametrize("path", ["/score/", "//evil.example/score", "/health/", "/docs",
                                  "/openapi.json", "/../../etc/passwd"])  # fmt: skip
def test_nothing_but_the_routes_is_answered_and_nobody_is_sent_elsewhere(path):
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    import asyncio

    from fuzz.server import TOKEN, _app, _send

    app, loop = _app()
    headers = [(b"authorization", f"Bearer {TOKEN}".encode()), (b"host", b"evil.example")]
    asyncio.set_event_loop(loop)
    status, _, content = loop.run_until_complete(_send(app, path, "POST", headers, b"{}"))
    assert status == 404
    assert "expected one of" in json.loads(content)["error"]["message"]
