"""instructor: answers as pydantic models, by a tool and by a JSON schema. Runs in the environment of the clients."""

from __future__ import annotations

import os

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


MODEL = os.environ["MLXQ_MODEL"]
OPENAI = OpenAI(base_url=f"{os.environ['MLXQ_URL']}/v1", api_key=os.environ["MLXQ_API_KEY"])
REQUESTS = ((instructor.Mode.TOOLS, "person by a tool"), (instructor.Mode.JSON_SCHEMA, "person as JSON"))

for mode, content in REQUESTS:
    client = instructor.from_openai(OPENAI, mode=mode)
    messages = [{"role": "user", "content": content}]
    person = client.chat.completions.create(model=MODEL, response_model=Person, messages=messages)
    assert isinstance(person, Person), (mode, person)
    assert (person.name, person.age) == ("Ada é", 36), (mode, person)
