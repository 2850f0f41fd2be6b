"""A page in a real browser, headless: what it draws, and whether anything in it is wrong."""

import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium")

# Runs in the page before anything else; the answer is read from the dumped document.
WATCH = """<script>
const faults = [];
window.addEventListener("error", event => faults.push(String(event.message || event.target.outerHTML)), true);
window.alert = text => faults.push("alert " + text);
window.addEventListener("load", () => {
  const plots = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const inside = [...svg.querySelectorAll("path, text")].map(part => part.getBoundingClientRect());
    return {
      width: box.width, height: box.height, drawn: inside.filter(part => part.width + part.height > 0).length,
      label: svg.parentElement.getAttribute("aria-label"), role: svg.parentElement.getAttribute("role"),
    };
  });
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify({
    faults, plots, fetched: performance.getEntriesByType("resource").map(entry => entry.name),
    captions: [...document.querySelectorAll("caption")].map(caption => caption.textContent),
    verdict: document.querySelector(".verdict").textContent,
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
    images: document.querySelectorAll("main img, main script").length,
  });
  document.body.append(answer);
});
</script>"""


def look(page, folder, width):
    """Open a page at this width in pixels: nothing fails, nothing is fetched, every plot is drawn; what was seen."""
    path = folder / "page.html"
    path.write_text(page.replace("<head>", "<head>" + WATCH, 1), encoding="utf-8")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *quiet),
            *(f"--user-data-dir={folder / 'user'}", "--enable-logging=stderr", f"--window-size={width},900"),
            *("--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    answer = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert "CONSOLE" not in done.stderr
    assert (answer["faults"], answer["fetched"], answer["images"], answer["wide"]) == ([], [], 0, False)
    for plot in answer["plots"]:
        assert plot["width"] > 300
        assert plot["height"] > 150
        assert plot["drawn"] > 10
        assert plot["role"] == "img"
        assert plot["label"]
    return answer
