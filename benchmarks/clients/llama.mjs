// Runs a GGUF export in llama.cpp, by node-llama-cpp's prebuilt binary: FOLDER JOB
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { JinjaTemplateChatWrapper, getLlama } from "node-llama-cpp";

const [folder, file] = process.argv.slice(2);
const job = JSON.parse(readFileSync(file, "utf8"));
const name = readdirSync(folder).find((name) => name.endsWith(".gguf"));
const maxThreads = Number(process.env.OMP_NUM_THREADS ?? 0); // 0: llama.cpp decides
const llama = await getLlama({ gpu: false, build: "never", maxThreads });
const model = await llama.loadModel({ modelPath: join(folder, name) });
const context = await model.createContext({ contextSize: 2048 });
const sequence = context.getSequence();

const wrapper = new JinjaTemplateChatWrapper({
  template: model.fileInfo.metadata.tokenizer.chat_template,
  tokenizer: model.tokenizer,
});
const turn = { system: (text) => ({ type: "system", text }), user: (text) => ({ type: "user", text }),
  assistant: (text) => ({ type: "model", response: [text] }) };
const chat = (messages) => {
  const chatHistory = messages.map(({ role, content }) => turn[role](content));
  chatHistory.push({ type: "model", response: [] });
  return wrapper.generateContextState({ chatHistory }).contextText.tokenize(model.tokenizer);
};

const answers = [];
let [promptSeconds, decodingSeconds] = [0, 0];
for (const prompt of job.prompts) {
  await sequence.clearHistory();
  const answer = [];
  const started = performance.now();
  let first = 0;
  for await (const token of sequence.evaluate(prompt, { temperature: 0 })) {
    first ||= performance.now();
    if (job.ends.includes(token)) break;
    answer.push(token);
    if (answer.length === job.max_new_tokens) break;
  }
  promptSeconds += (first - started) / 1000;
  decodingSeconds += (performance.now() - first) / 1000;
  answers.push(answer);
}
const memory = Number(readFileSync("/proc/self/status", "utf8").match(/VmHWM:\s+(\d+)/)[1]) * 1024;

// Without top-k, top-p and min-p, all tokens have probabilities; their logarithms serve as logits.
const all = { temperature: 1, topK: 0, topP: 1, minP: 0 };
const logits = new Float32Array(job.probes.length * job.vocabulary);
for (const [row, ids] of job.probes.entries()) {
  await sequence.clearHistory();
  const output = sequence.evaluateWithMetadata(ids, { probabilities: true }, all);
  const { value } = await output.next();
  await output.return();
  const start = row * job.vocabulary;
  logits.fill(-100, start, start + job.vocabulary);
  for (const [token, chance] of value.probabilities)
    logits[start + token] = Math.log(Math.max(chance, 1e-40));
}
writeFileSync("logits", Buffer.from(logits.buffer));

const results = JSON.stringify({
  texts: job.texts.map((text) => model.tokenize(text, true)),
  prompts: job.messages.map(chat),
  answers,
  prompt_seconds: promptSeconds,
  decoding_seconds: decodingSeconds,
  peak_memory_bytes: memory,
  note: `\`${name}\``,
});
process.stdout.write(`${results}\n`, () => process.exit(0)); // exits when all is written
