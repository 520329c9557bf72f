lm_eval --model local-completions --tasks arc_easy \
    --model_args model=smollm2-135m-instruct,base_url=http://127.0.0.1:8000/v1/completions
