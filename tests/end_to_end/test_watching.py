"""What people watch a real server with: the page on its metrics port, and `attendant top`."""

import re
import time

from attendant import cli


def test_page_and_top_show_the_traffic_of_a_real_server(module_start, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    server = module_start("--models", "tiny-fp32", "--seq-buckets", "16,64").wait_ready()
    for length in (5, 40):
        list(server.long_answer(20, prompt="a" * length))
    page = server.get("/")
    assert "tiny-fp32/1</th>" in page and '<td class="ready">ready</td>' in page
    assert re.findall(r'<section data-latency="(.*?)">', page) == ["first token", "between tokens", "request"]
    assert page.count('class="fit"') == 2  # the checks at load have taught it what a prompt and a token cost
    assert server.get("/status") != "" and "attendant_build_info" in server.get("/metrics")
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    assert cli.main(["top", "--once", "--metrics", url]) == 0
    heading, _, titles, row, *latencies = capsys.readouterr().out.splitlines()
    assert "since the server started" in heading and "ago" in heading
    shown = dict(zip(re.split(r"  +", titles.strip()), re.split(r"  +", row.strip()), strict=True))
    assert (shown["MODEL"], shown["STATE"], shown["RUN"], shown["WAIT"]) == ("tiny-fp32/1", "ready", "0", "0")
    assert float(shown["TOKENS/S"]) >= 0 and float(shown["BATCH"]) == 1.0
    requests = [int(line.split()[2]) for line in latencies if line.strip().startswith(("<=", ">"))]
    assert sum(requests) == 2


def test_a_page_costs_milliseconds(server) -> None:
    """Best of five; measured: 6 ms for three models, half of what a scrape takes."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        server.get("/status")
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.1
