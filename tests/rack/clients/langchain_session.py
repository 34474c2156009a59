"""LangChain: ``python -m tests.rack.clients.langchain_session BASE``."""

import json
import sys
from typing import Any

import pydantic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.rack.clients.shapes import CAPITAL, SENTENCES, WEATHER, City


def main(base: str) -> dict[str, Any]:
    """Chat, stream, tools, schema, embeddings."""
    key = pydantic.SecretStr("none")
    chat = ChatOpenAI(base_url=base, api_key=key, model="m", temperature=0, max_completion_tokens=100)
    bound = chat.bind_tools([WEATHER], tool_choice="required")
    question = HumanMessage("How is the weather in Oslo?")
    called = bound.invoke([question])
    call = called.tool_calls[0]
    again = chat.bind_tools([WEATHER]).invoke([question, called, ToolMessage("rain", tool_call_id=call["id"])])
    vectors = OpenAIEmbeddings(base_url=base, api_key=key, model="e", check_embedding_ctx_length=False)
    by_schema = chat.with_structured_output(City, method="json_schema").invoke("Describe Rome.")
    by_call = chat.with_structured_output(City, method="function_calling", strict=True).invoke("Describe Rome.")
    return {
        "whole": chat.invoke(CAPITAL).content,
        "streamed": "".join(str(chunk.content) for chunk in chat.stream(CAPITAL)),
        "call": [call["name"], call["args"]],
        "after": again.content,
        "schemas": [isinstance(found, City) for found in (by_schema, by_call)],
        "vectors": [len(vector) for vector in vectors.embed_documents(SENTENCES)],
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
