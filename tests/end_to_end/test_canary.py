"""The canary in a real server: it watches, says what it saw, and holds nothing up."""

from attendant.v1 import generation_pb2 as pb

GREEDY = pb.SamplingParams(temperature=0.0, max_tokens=200)


def test_a_finished_greedy_request_is_replayed_and_the_server_stops_whatever_is_pending(start, eventually) -> None:
    server = start("--canary-rate", "1", "--models", "tiny-int8").wait_ready()
    results = ("same", "different", "skipped")

    def replays() -> list[float]:
        labels = {"model": "tiny-int8/1"}
        return [server.value("attendant_canary_replays_total", result=result, **labels) for result in results]

    assert replays() == [0, 0, 0]
    calls = [server.generate("tiny-int8", sampling=GREEDY, prompt=f"Story {number}: once") for number in range(4)]
    assert all(list(call)[-1].finished.usage.output_tokens for call in calls)
    eventually(lambda: replays() == [1, 0, 0])
    assert server.value("attendant_requests_finished_total", model="tiny-int8/1") == 4
    assert server.value("attendant_time_to_first_token_seconds_count", model="tiny-int8/1") == 4
    assert list(server.generate("tiny-int8", sampling=GREEDY))
    server.signal()
    assert server.wait() == 0
    assert "Traceback" not in server.log.read_text()
