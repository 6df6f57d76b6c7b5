"""The report as one HTML file: complete without a network, and a browser that clicks through it finds everything."""

import json
import re
import shutil
import subprocess

import pytest

from hydrahead.evaluation.report import build_report, page
from hydrahead.evaluation.statistics import wilson_interval

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
TASKS = {"niah_single_2": [0.1, 0.9], "niah_multiquery": [None, None]}


def make_report(**changes) -> dict:
    """A report of two models that were asked two tasks at two lengths, one of which one of them could not read."""
    models = [
        {
            "label": label,
            "name": label,
            "model_type": kind,
            "parameters": 1234,
            "dtype": "float32",
            "native_length": 512,
            "kv_bytes_per_token": 100,
            "state_bytes": state,
            "template": False,
        }
        for label, kind, state in (("teacher", "qwen3", 0), ("student", "hydrahead", 4096))
    ]
    needles = []
    for label, accuracy in (("teacher", 0.5), ("student", 1.0)):
        for task, depths in TASKS.items():
            for length in (512, 1024):
                cell = {"model": label, "task": task, "length": length}
                if (label, length) == ("teacher", 1024):
                    needles.append(cell | {"error": "out of memory"})
                    continue
                low, high = wilson_interval(accuracy, 2)
                example = {"question": f"Where is it, {task} at {length}?", "expected": ["12"], "score": accuracy}
                example["answer"] = HOSTILE if label == "teacher" else f"{label} says 12"
                cell |= {"prompts": 2, "accuracy": accuracy, "low": low, "high": high, "seconds": 1.0}
                needles.append(cell | {"scores": [accuracy] * 2, "depths": depths, "examples": [example]})
    text = [
        {
            "model": label,
            "domain": domain,
            "length": 256,
            "tokens": 512,
            "bytes": 1500,
            "loss": loss,
            "by_position": [[0, 128, loss + 0.5], [128, 256, loss - 0.5]],
            "window_losses": [loss, loss],
            "seconds": 2.0,
            **({} if label == "teacher" else {"kl": 0.25, "agreement": 0.75}),
        }
        for label, loss in (("teacher", 2.0), ("student", 2.5))
        for domain in ("books", "code")
    ]
    harness = [
        {"model": label, "task": "piqa", "length": None, "metrics": {"acc": [0.7, 0.01]}, "samples": 9, "seconds": 1.0}
        for label in ("teacher", "student")
    ]
    curve = {"pairs": 4, "intact": 1.0, "sizes": [1, 2], "random": [[1.0, 0.5]] * 2}
    heads = {
        "masks": [[1, 0], [0, 1]],
        "method": "replacement",
        "scores": [[1.0, -0.25], [None, 0.5]],
        "capabilities": {"retrieval": [[1.0, 0.0], [0.0, 0.125]]},
        "warnings": ["a warning in words"],
        "stability": {"replacement": {"4": {"heads": 3, "rho": 0.9, "rho_low": 0.8, "rho_high": 1.0,
                                            "overlap": 1.0, "overlap_low": 1.0, "overlap_high": 1.0}}},
        "knockout": {"ablation": {"one": curve | {"methods": {"replacement": {"top": [0, 0], "bottom": [1, 1]}}},
                                  "two": curve | {"methods": {"replacement": {"top": [1, 0], "bottom": [1, 0]}}}}},
    }  # fmt: skip
    made = {"text_name": "some text", "prompts": 2, "depths": 0, "new_tokens": None, "text_tokens": 512}
    made |= {"hardware": "a machine", "date": "2026-11-25", "versions": {"torch": "2"}}
    cells = {"models": models, "needles": needles, "batching": [], "text": text, "lm_eval": harness}
    return build_report(made, cells | changes, changes.get("heads", heads))


def test_a_page_asks_for_nothing_from_elsewhere():
    text = page(make_report())
    assert set(re.findall(r"https?://[^\"\'\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img|iframe)[^>]* (src|href)=", text.replace(json.dumps(HOSTILE), ""))
    assert "default-src 'none'" in text and HOSTILE not in text and "/*DATA*/" not in text


# Run behind the page: presses everything that can be pressed, points at everything, and writes down what it saw.
VISITOR = """
<script>
const seen = {sections: [], buttons: 0, tips: [], words: {}};
for (const node of document.querySelectorAll("section")) seen.sections.push(node.id);
function press(node) {
  for (const bar of node.querySelectorAll(".choices")) for (const button of bar.querySelectorAll("button")) {
    if (!button.isConnected) continue;
    button.click();
    seen.buttons += 1;
    if (button.getAttribute("aria-pressed") !== "true") seen.unpressed = button.textContent;
    const section = button.closest("section");
    seen.words[section.id + ": " + button.textContent] = section.textContent;
    for (const each of section.querySelectorAll("[data-tip]")) {
      each.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
      const tip = document.getElementById("tip");
      if (getComputedStyle(tip).display !== "block") seen.hidden = each.outerHTML;
      seen.tips.push(tip.textContent);
    }
    press(bar.nextElementSibling);  // where there may be more buttons now
  }
}
for (const section of document.querySelectorAll("section")) press(section);
const charts = [...document.querySelectorAll("svg")];
seen.broken = charts.filter(node => /NaN|undefined|Infinity/.test(node.outerHTML)).length;
seen.title = document.title;
seen.errors = errors;
const outcome = document.createElement("pre");
outcome.id = "outcome";
outcome.textContent = JSON.stringify(seen);
document.body.append(outcome);
</script>
"""
LISTENER = "<script>const errors = []; addEventListener('error', event => errors.push(event.message));</script>"


def visit(text: str, tmp_path) -> dict:
    """What a browser shows of a page to someone who clicks through it."""
    file = tmp_path / "report.html"
    file.write_text(text.replace("<style>", LISTENER + "<style>", 1).replace("</html>", VISITOR + "</html>"))
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run([BROWSER, *flags, file.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, flags=re.S)
    assert found, done.stdout[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_finds_heads_curves_maps_costs_and_answers(tmp_path):
    seen = visit(page(make_report()), tmp_path)
    assert seen["errors"] == [] and seen["broken"] == 0 and seen["title"] == "HydraHead: evaluation"
    assert "hidden" not in seen and "unpressed" not in seen
    assert seen["sections"] == ["models", "heads", "needles", "text", "lm-eval", "samples"]
    tips, words = set(seen["tips"]), seen["words"]
    assert "layer 0, head 1: linear\nall capabilities: -0.250\nretrieval: 0.000" in tips
    assert "layer 1, head 0: linear\nall capabilities: unknown\nretrieval: 0.000" in tips
    assert "student, 1K, depth 0–20%: 1.00 of 1" in tips and "student, 1K, depth 20–40%: not asked" in tips
    assert "its best, 2 heads: 0.00" in tips and "student, positions 128–256: 2.000" in tips
    assert "a warning in words" in words["heads: retrieval"] and "0.90 (0.80 to 1.00)" in words["heads: retrieval"]
    for task in TASKS:
        assert "out of memory" in words[f"needles: {task}"]
    assert "+0.500 (+0.500 to +0.500" in words["needles: niah_single_2"]
    assert "1.231" in words["text: code"] and "75.0%" in words["text: code"]  # bits a byte
    assert HOSTILE in words["samples: 512"] and "student says 12" in words["samples: 1K"]
    assert "Where is it, niah_multiquery at 1024?" in words["samples: 1K"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_page_of_little_shows_it(tmp_path):
    none = {"needles": [], "text": [], "lm_eval": [], "batching": []}
    masks = {"masks": [[1, 0], [0, 1]]}
    seen = visit(page(make_report(**none, heads=masks)), tmp_path)
    assert seen["errors"] == [] and seen["sections"] == ["models", "heads"]
    assert "layer 0, head 0: full attention" in seen["tips"]
    seen = visit(page(make_report(**none, heads=None)), tmp_path)
    assert seen["errors"] == [] and seen["sections"] == ["models"]
