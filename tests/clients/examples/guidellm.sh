guidellm run --backend kind=openai_http,target=http://127.0.0.1:8000 --profile kind=concurrent,streams=2 \
    --data kind=json_file,path=prompts.jsonl --constraint kind=max_requests,count=20
