import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)
    population: int = Field(ge=0, le=100_000_000)


client = instructor.from_openai(
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"), mode=instructor.Mode.JSON_SCHEMA
)
city = client.create(
    model="smollm2-135m-instruct",
    messages=[{"role": "user", "content": "Describe Paris."}],
    response_model=City,
    temperature=0,
)
print(city)
