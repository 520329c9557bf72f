from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    base_url="http://127.0.0.1:8000/v1",
    api_key="none",
    model="smollm2-135m-instruct",
    temperature=0,
    max_completion_tokens=64,
)
print(model.invoke("What is the capital of France?").content)
for chunk in model.stream("What is the capital of France?"):
    print(chunk.content, end="", flush=True)
