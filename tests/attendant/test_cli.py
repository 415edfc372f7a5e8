"""The attendant command as a person runs it: a process of its own, pipes and a terminal."""

import json
import os
import re
import signal
import threading

import grpc
from google.rpc import error_details_pb2

from attendant.v1 import model_service_pb2

PATIENCE = 20  # seconds


def test_the_prompt_comes_from_the_argument_or_from_standard_input(run, script):
    for done in (
        run("generate", "once upon"),
        run("generate", stdin="once upon"),
        run("generate", "-", stdin="once upon"),
    ):
        assert (done.returncode, done.stdout, done.stderr) == (0, "Hello\n", "")
    assert {request.prompt for request in script.requests} == {"once upon"}
    assert {request.model for request in script.requests} == {"tiny"}  # the only one that is ready


def test_options_reach_the_request(run, script):
    run("generate", "hi", "--max-tokens", "7", "--temperature", "0", "--stop", "a", "--stop", "b", "--ignore-eos")
    (request,) = script.requests
    assert (request.sampling.max_tokens, request.sampling.temperature) == (7, 0)
    assert request.sampling.HasField("temperature") and not request.sampling.HasField("top_k")
    assert list(request.stop.strings) == ["a", "b"] and request.stop.ignore_eos


def test_text_appears_before_the_answer_is_complete(start, script):
    script.hang("first words")
    process = start("generate", "hi")
    assert os.read(process.stdout.fileno(), 100) == b"first words"


def test_ctrl_c_cancels_on_the_server_and_leaves_with_130(start, script):
    script.hang("first words")
    process = start("generate", "hi")
    assert os.read(process.stdout.fileno(), 100)
    process.send_signal(signal.SIGINT)
    assert script.cancelled.wait(PATIENCE)
    assert process.wait(PATIENCE) == 130
    assert process.stderr.read() == b"\n"


def test_a_reader_that_leaves_ends_the_command_quietly(start, script, make_answer):
    go_on = threading.Event()

    def generate(request, context):
        first, *rest = make_answer(*["more " * 1000] * 200)
        yield first
        assert go_on.wait(PATIENCE)
        yield from rest

    script.generate = generate
    process = start("generate", "hi")
    process.stdout.close()
    go_on.set()
    assert process.wait(PATIENCE) == 141
    assert process.stderr.read() == b""


def test_json_is_one_event_a_line(run, script, make_answer):
    script.generate = lambda request, context: iter(make_answer("a\n", logprobs=True))
    done = run("generate", "hi", "--json", "--logprobs")
    started, delta, finished = map(json.loads, done.stdout.splitlines())
    assert started == {
        "event": "started", "request_id": "r1", "model": "tiny/1", "prompt_tokens": 3, "seed": 2**64 - 1,
        "source_labels": [],
    }  # fmt: skip
    assert (delta["event"], delta["text"], delta["logprobs"][0]["top"]) == (
        "delta", "a\n", [{"token_id": 9, "logprob": -1.0}],
    )  # fmt: skip
    assert (finished["event"], finished["finish_reason"]) == ("finished", "eos")


def test_stats_go_to_standard_error(run):
    done = run("generate", "hi", "--stats")
    assert done.stdout == "Hello\n"
    assert re.search(r"3 prompt tokens \(1 cached\), 3 generated, ended by eos; seed 18446744073709551615", done.stderr)
    assert "queue 1 ms" in done.stderr and "then 4 tokens/s" in done.stderr


def test_a_refused_request_is_one_line_and_status_2(run, script, refusal):
    info = error_details_pb2.ErrorInfo(reason="INVALID_FIELD", domain="attendant")
    script.fail(refusal(grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p is 2.0:\nin (0, 1]", info))
    done = run("generate", "hi", "--top-p", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "attendant: sampling.top_p is 2.0: in (0, 1] [INVALID_FIELD]\n"


def test_what_no_request_can_hold_is_refused_before_it_is_sent(run, script):
    for arguments, said in (
        (("generate", "hi", "--max-tokens", str(2**40)), "max_tokens: "),
        (("generate", "hi", "--max-tokens", "many"), "invalid int value"),
        (("generate", "hi", "--no-such-option"), "unrecognized arguments"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and said in done.stderr
    done = run("generate", stdin=b"\xff\xfe")
    assert done.returncode == 2 and done.stderr.startswith("attendant: standard input is not UTF-8")
    assert script.requests == []


def test_without_a_server_one_line_says_where_it_was_looked_for(run, free_port):
    done = run("models", "--server", f"127.0.0.1:{free_port}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"attendant: no server answers at 127.0.0.1:{free_port} (")
    assert done.stderr.count("\n") == 1


def test_several_models_must_be_chosen_from(run, script):
    ready = model_service_pb2.MODEL_STATE_READY
    script.models.append(model_service_pb2.Model(name="other", version=1, state=ready, tasks=["generate"]))
    done = run("generate", "hi")
    assert (done.returncode, done.stderr) == (2, "attendant: choose a model with --model: other, tiny\n")
    assert run("generate", "hi", "--model", "other").returncode == 0
    script.models = []
    assert "no model ready that can generate" in run("generate", "hi").stderr
    script.models = [model_service_pb2.Model(name="encoder", version=1, state=ready, tasks=["embed"])]
    assert "no model ready that can generate" in run("generate", "hi").stderr
    assert run("embed", "hi").returncode == 0


def test_each_text_or_line_becomes_an_array_of_its_own(run, script):
    script.models = [
        model_service_pb2.Model(name="encoder", version=1, state=model_service_pb2.MODEL_STATE_READY, tasks=["embed"])
    ]
    assert run("embed", "a", "b c").stdout == "[0.5, 1.0]\n[0.5, 3.0]\n"
    assert run("embed", "--truncate", "--dimensions", "2", stdin="a\nb c\n").stdout == "[0.5, 1.0]\n[0.5, 3.0]\n"
    one, two = script.requests
    assert [item.text for item in one.inputs] == [item.text for item in two.inputs] == ["a", "b c"]
    assert (two.truncate, two.dimensions, one.HasField("dimensions")) == (True, 2, False)


def test_models_are_an_aligned_table_with_the_reason_of_a_refusal(run, script):
    script.models.append(
        model_service_pb2.Model(
            name="broken-model",
            version=12,
            state=model_service_pb2.MODEL_STATE_UNAVAILABLE,
            reason="sha256\x1b[31m differs",
        )
    )
    assert run("models").stdout == (
        "MODEL            STATE        PRECISION  READS  CONTEXT  TASKS     REASON\n"
        "tiny/1           ready        int8       text        64  generate\n"
        "broken-model/12  unavailable                                       sha256\\x1b[31m differs\n"
    )
    assert [json.loads(line)["name"] for line in run("models", "--json").stdout.splitlines()] == [
        "tiny",
        "broken-model",
    ]


def test_tokens_are_shown_as_the_vocabulary_spells_them(run):
    assert run("tokenize", "a b").stdout == "ID  TOKEN\n 1  a\n 2  Ġb\n"
    assert json.loads(run("tokenize", "--json", stdin="a b").stdout)["token_ids"] == [1, 2]


def test_one_message_is_answered_with_the_system_before_it(run, script):
    assert run("chat", "hi there", "--system", "Be brief.").stdout == "Hello\n"
    assert run("chat", stdin="hi there\n").stdout == "Hello\n"
    turns = [[(m.role, m.content) for m in request.messages.messages] for request in script.requests]
    assert turns == [[("system", "Be brief."), ("user", "hi there")], [("user", "hi there\n")]]


def test_a_conversation_goes_on_after_ctrl_c_and_errors_until_ctrl_d(
    on_terminal, script, terminal, refusal, make_answer
):
    process = on_terminal("chat")
    terminal.wait_for("Ctrl-D.*> ")
    script.hang("thinking")
    terminal.type("one\n")
    terminal.wait_for("thinking")
    terminal.type("\x03")
    assert script.cancelled.wait(PATIENCE)
    terminal.wait_for("> ")

    script.fail(refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"))
    terminal.type("two\n")
    terminal.wait_for("attendant: full .*> ")

    script.generate = lambda request, context: iter(make_answer("fine\x1b[2J"))
    terminal.type("three\n")
    terminal.wait_for(r"fine\\x1b\[2J")
    terminal.wait_for("> ")
    said = [(m.role, m.content) for m in script.requests[-1].messages.messages]
    assert said == [("user", "one"), ("assistant", "thinking"), ("user", "three")]
    terminal.interrupt_until("> ")
    terminal.type("\x04")
    assert process.wait(PATIENCE) == 0


def test_a_terminal_without_a_prompt_is_told_what_to_give(on_terminal, terminal):
    process = on_terminal("generate")
    terminal.wait_for("give a prompt as an argument or on standard input")
    assert process.wait(PATIENCE) == 2


def test_tasks_of_encoders_are_printed_as_tables_or_json(run, script, tmp_path):
    ready = model_service_pb2.MODEL_STATE_READY
    tasks = ("classify", "tag", "fill_mask", "score")
    script.models = [model_service_pb2.Model(name=task, version=1, state=ready, tasks=[task]) for task in tasks]
    assert run("classify", "a", "--top-k", "1").stdout.splitlines()[1].split() == ["a", "good", "0.7500"]
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    assert "good" in run("classify", "--image", str(tmp_path / "a.png"), "--resize").stdout
    assert script.requests[-1].inputs[0].image.encoded == b"\x89PNG" and script.requests[-1].resize
    run("classify", "a", "--pair", "b")
    assert script.requests[-1].inputs[0].pair.second == "b"
    assert run("tag", "Ada").stdout.splitlines()[1].split() == ["Ada", "person", "0.5000", "0-3"]
    assert run("fill", stdin="a [MASK]").stdout.splitlines()[1].split() == ["2", "cat", "0.5000"]
    lines = run("rerank", "q", "a", "ccc").stdout.splitlines()
    assert [line.split() for line in lines[1:]] == [["3.0000", "ccc"], ["1.0000", "a"]]
    assert json.loads(run("tag", "Ada", "--json").stdout)["tokens"][0]["label"] == "person"
    assert json.loads(run("rerank", "q", "a", "--json").stdout)["order"] == [0]
    missing = run("classify", "--image", str(tmp_path / "none.png"))
    assert (missing.returncode, "none.png" in missing.stderr) == (2, True)
