"""The requests of every session."""

from typing import Any

import pydantic

CAPITAL = "What is the capital of France?"
PARIS = "The capital of France is Paris."
SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


class City(pydantic.BaseModel):
    """Facts of a city."""

    name: str = pydantic.Field(max_length=20)
    continent: str = pydantic.Field(pattern="^(Europe|Asia|Africa)$")
