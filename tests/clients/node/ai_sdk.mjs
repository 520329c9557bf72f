import {createOpenAICompatible} from "@ai-sdk/openai-compatible";
import {streamText} from "ai";

const fen = createOpenAICompatible({name: "fen", baseURL: "http://127.0.0.1:8000/v1"});
const {textStream} = streamText({
    model: fen("smollm2-135m-instruct"),
    prompt: "What is the capital of France?",
    temperature: 0,
});
for await (const text of textStream)
    process.stdout.write(text);
