"""Third-party clients against real models: chat, streaming, tools, schema and embeddings."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from scripts.fetch_demo_model import EMBEDDER, MAIN, default_folder
from tests.rack.clients.shapes import CAPITAL, PARIS, SENTENCES, WEATHER, City
from tests.rack.harness import Agent, rack, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NPM_PACKAGE = "openai@7.55.0"
NPM_FOLDER = Path("build/clients")
TOWNS = ("Oslo", "Rome")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    models = [
        {"name": "m", "path": str(default_folder() / MAIN), "rows": 4, "plan_context_tok": 2048},
        {"name": "e", "path": str(default_folder() / EMBEDDER), "cache_bytes": 0},
    ]
    with rack(tmp_path_factory.mktemp("clients"), models) as (one,):
        until(lambda: len(one.get("/v1/models").json["data"]) == 2, "both models are ready", 600)
        yield one


@pytest.fixture(scope="module")
def base(agent: Agent) -> str:
    return f"http://127.0.0.1:{agent.port}/v1"


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # of the client, for its own object
def test_openai_for_python(base: str) -> None:
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as one:
        asked: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 100}
        question: Any = [{"role": "user", "content": CAPITAL}]
        whole = one.chat.completions.create(messages=question, **asked)
        assert whole.choices[0].message.content == PARIS
        with one.chat.completions.stream(messages=question, **asked) as stream:
            assert stream.get_final_completion().choices[0].message.content == whole.choices[0].message.content

        call = _required_call(one, asked)
        again: Any = [*_weather_question(), call, _result(call.tool_calls[0].id)]
        answered = one.chat.completions.create(messages=again, **asked, tools=[WEATHER])
        assert answered.choices[0].message.content
        parsed = one.chat.completions.parse(
            messages=[{"role": "user", "content": "Describe Rome."}], response_format=City, **asked
        )
        assert isinstance(parsed.choices[0].message.parsed, City)
        turns: Any = [question[0], parsed.choices[0].message, {"role": "user", "content": "And Oslo?"}]
        local = {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "num_ctx": 2048}
        echoed = one.chat.completions.with_raw_response.create(messages=turns, **asked, extra_body=local)
        assert echoed.parse().choices[0].message.content
        assert echoed.headers["X-Mlxrack-Ignored"] == "num_ctx"
        _check_vectors(one)


def _weather_question() -> list[dict[str, Any]]:
    return [{"role": "user", "content": "How is the weather in Oslo?"}]


def _result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "rain"}


def _required_call(one: openai.OpenAI, asked: dict[str, Any]) -> Any:
    """A tool call, with and without streaming."""
    more: dict[str, Any] = {**asked, "messages": _weather_question(), "tools": [WEATHER], "tool_choice": "required"}
    choice = one.chat.completions.create(**more).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["town"] in TOWNS
    with one.chat.completions.stream(**more) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls
    assert call.function.arguments == streamed.message.tool_calls[0].function.arguments
    return choice.message


def _check_vectors(one: openai.OpenAI) -> None:
    """The similarities that the encoder's makers publish for these sentences."""
    found = one.embeddings.create(model="e", input=SENTENCES)
    a, b, c = (item.embedding for item in found.data)
    assert [round(_dot(a, b), 3), round(_dot(a, c), 3), round(_dot(b, c), 3)] == [0.666, 0.105, 0.141]
    plain = one.embeddings.create(model="e", input=SENTENCES[0], encoding_format="float", dimensions=384)
    assert all(math.isclose(x, y, abs_tol=1e-6) for x, y in zip(a, plain.data[0].embedding, strict=True))
    with pytest.raises(openai.BadRequestError, match="dimensions: this model's vectors have 384 numbers"):
        one.embeddings.create(model="e", input=SENTENCES[0], dimensions=256)
    by_decoder = one.embeddings.create(model="m", input=["a cat", "a kitten"])
    x, y = (item.embedding for item in by_decoder.data)
    assert (len(x), round(_dot(x, x), 3)) == (576, 1.0)
    assert _dot(x, y) > 0.5
    with pytest.raises(openai.BadRequestError, match="is an embedding model and generates no text"):
        one.chat.completions.create(model="e", messages=[{"role": "user", "content": "hi"}])


def _dot(x: list[float], y: list[float]) -> float:
    return sum(p * q for p, q in zip(x, y, strict=True))


def test_openai_for_node(base: str) -> None:
    folder = _npm_client()
    script = Path(__file__).parent / "clients" / "openai_session.mjs"
    shutil.copy(script, folder / script.name)
    run = subprocess.run(
        ["node", script.name, base], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["whole"] == found["streamed"] == PARIS
    assert found["call"] == found["streamedCall"]
    assert (found["call"]["name"], json.loads(found["call"]["arguments"])["town"] in TOWNS) == ("weather", True)
    City.model_validate_json(found["schema"])
    assert (found["vector"], found["error"]) == (384, [404, "model_not_found"])


def _npm_client() -> Path:
    """A folder with the client installed; skips without npm or network."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("needs node and npm")
    NPM_FOLDER.mkdir(parents=True, exist_ok=True)
    if not (NPM_FOLDER / "node_modules" / "openai").is_dir():
        words = ["npm", "install", "--no-audit", "--no-fund", "--no-save", "--prefix", ".", NPM_PACKAGE]
        run = subprocess.run(words, cwd=NPM_FOLDER, capture_output=True, text=True, timeout=600, check=False)
        if run.returncode != 0:
            pytest.skip("npm cannot fetch the client here")
    return NPM_FOLDER


def _session(name: str, base: str) -> Any:
    """The output of a client that runs as a separate program."""
    words = [sys.executable, "-m", f"tests.rack.clients.{name}", base]
    run = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_langchain(base: str) -> None:
    found = _session("langchain_session", base)
    assert found["whole"] == found["streamed"] == PARIS
    name, arguments = found["call"]
    assert (name, arguments["town"] in TOWNS) == ("weather", True)
    assert found["after"]
    assert (found["schemas"], found["vectors"]) == ([True, True], [384] * 3)


def test_pydantic_ai(base: str) -> None:
    found = _session("pydantic_ai_session", base)
    assert found["whole"] == found["streamed"] == PARIS
    assert found["with_tools"]
    assert (found["schemas"], found["vectors"]) == ([True, True], [384] * 3)
