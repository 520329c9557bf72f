// llama.cpp as a worker: `node llama_cpp.mjs DIRECTORY`, where node-llama-cpp is installed in DIRECTORY. It speaks the
// protocol of bench/peers/worker.py.
//
// The binding's own generator costs llama.cpp time for every token (promises, locks, queues). Here batches are handed to
// the native context directly, as a C++ program would, so that what is compared is llama.cpp and not a wrapper of it.

import {createInterface} from "node:readline";
import {load_binding} from "./llama_cpp_binding.mjs";

const {module: {getLlama, LlamaLogLevel}, version} = await load_binding(process.argv[2]);
const now = () => Number(process.hrtime.bigint()) * 1e-9;
let llama, single, parallel; // one context for a prompt alone, one for several: each at its best

async function create_context(model, options) {
    const context = await model.createContext(options);
    const native = context._ctx;
    native.setThreads(options.threads);
    const samplers = Array.from({length: options.sequences}, () => {
        const sampler = new llama._bindings.AddonSampler(model._model);
        sampler.applyConfig({temperature: 0});
        return sampler;
    });
    return {native, samplers, batch_size: options.batchSize};
}

/** Evaluates one batch of [sequence, first position, tokens, is a token wanted]; the greedy tokens go to `tokens`. */
async function evaluate({native, samplers}, pieces, tokens) {
    native.initBatch(pieces.reduce((sum, [, , ids]) => sum + ids.length, 0));
    const logits = pieces.map(([id, position, ids, wanted]) =>
        native.addToBatch(id, position, Uint32Array.from(ids), Uint32Array.from(wanted ? [ids.length - 1] : [])));
    await native.decodeBatch();
    await Promise.all(pieces.map(async ([id, , , wanted], i) => {
        if (wanted)
            tokens[id].push(await native.sampleToken(logits[i][0], samplers[id]));
    }));
}

/** The prompts' first tokens: prompts are packed one after another into batches of batch_size tokens. */
async function evaluate_prompts(context, prompts, tokens) {
    let pieces = [], room = context.batch_size;
    for (const [id, prompt] of prompts.entries()) {
        context.native.disposeSequence(id);
        for (let start = 0; start < prompt.length;) {
            const ids = prompt.slice(start, start + room);
            pieces.push([id, start, ids, start + ids.length === prompt.length]);
            start += ids.length;
            room -= ids.length;
            if (room === 0) {
                await evaluate(context, pieces, tokens);
                pieces = [];
                room = context.batch_size;
            }
        }
    }
    if (pieces.length > 0)
        await evaluate(context, pieces, tokens);
}

async function load({model, threads, batch_size, flash_attention, context, streams, stream_context}) {
    llama = await getLlama({gpu: false, build: "never", maxThreads: 0, logLevel: LlamaLogLevel.error});
    const loaded = await llama.loadModel({modelPath: model});
    const options = {threads, batchSize: batch_size, flashAttention: flash_attention};
    single = await create_context(loaded, {...options, sequences: 1, contextSize: context});
    parallel = await create_context(loaded, {...options, sequences: streams, contextSize: stream_context});
    return {
        settings: `${single.native.getThreads()} threads, batch and micro-batch ${batch_size}, flash attention `
            + `${flash_attention ? "on" : "off"}, KV cache f16, native batches`,
        versions: {"node-llama-cpp": version, "llama.cpp": llama.llamaCppRelease.release, system: llama.systemInfo},
    };
}

async function generate({prompts, new_tokens}) {
    const context = prompts.length === 1 ? single : parallel;
    const tokens = prompts.map(() => []);
    const start = now();
    await evaluate_prompts(context, prompts, tokens);
    const first = now();
    for (let i = 1; i < new_tokens; i++) {
        const pieces = tokens.map((done, id) => [id, prompts[id].length + i - 1, done.slice(-1), true]);
        await evaluate(context, pieces, tokens);
    }
    return {first_seconds: first - start, seconds: now() - start, tokens};
}

const operations = {load, generate};
for await (const line of createInterface({input: process.stdin})) {
    const {op, ...request} = JSON.parse(line);
    const answer = await operations[op](request).catch((error) => ({error: String(error.message ?? error)}));
    process.stdout.write(JSON.stringify(answer) + "\n");
}
process.exit(0);
