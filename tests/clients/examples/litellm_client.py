import litellm

reply = litellm.completion(
    model="hosted_vllm/smollm2-135m-instruct",
    api_base="http://127.0.0.1:8000/v1",
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
)
print(reply.choices[0].message.content)
