// Runs an ONNX export in transformers.js, on onnxruntime-node: FOLDER JOB
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, Tensor, env } from "@huggingface/transformers";

const [folder, file] = process.argv.slice(2);
const job = JSON.parse(readFileSync(file, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = `${dirname(folder)}/`;
const name = basename(folder);
const dtype = readdirSync(folder).includes("model_q4.onnx") ? "q4" : "q8";
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { dtype, subfolder: "" });
const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const inputsOf = (ids) => ({ input_ids: row(ids), attention_mask: row(ids.map(() => 1)) });

const answers = [];
let [promptSeconds, decodingSeconds] = [0, 0];
for (const prompt of job.prompts) {
  const times = [];
  const output = await model.generate({
    ...inputsOf(prompt),
    max_new_tokens: job.max_new_tokens,
    do_sample: false,
    streamer: { put: () => times.push(performance.now()), end: () => {} },
  });
  // The streamer gets the prompt first, before anything is computed.
  promptSeconds += (times[1] - times[0]) / 1000;
  decodingSeconds += (times.at(-1) - times[1]) / 1000;
  answers.push(output.tolist()[0].slice(prompt.length).map(Number));
}
const memory = Number(readFileSync("/proc/self/status", "utf8").match(/VmHWM:\s+(\d+)/)[1]) * 1024;

const logits = new Float32Array(job.probes.length * job.vocabulary);
for (const [index, ids] of job.probes.entries()) {
  const output = await model(inputsOf(ids));
  logits.set(output.logits.data.slice(-job.vocabulary), index * job.vocabulary);
}
writeFileSync("logits", Buffer.from(logits.buffer));

const template = { add_generation_prompt: true, return_tensor: false, return_dict: false };
const results = JSON.stringify({
  texts: job.texts.map((text) => tokenizer.encode(text, { add_special_tokens: false })),
  prompts: job.messages.map((messages) => tokenizer.apply_chat_template(messages, template)),
  answers,
  prompt_seconds: promptSeconds,
  decoding_seconds: decodingSeconds,
  peak_memory_bytes: memory,
});
process.stdout.write(`${results}\n`, () => process.exit(0)); // exits when all is written
