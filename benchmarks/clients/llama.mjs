// Token ids and greedy answers of llama.cpp, by node-llama-cpp's prebuilt binary: FOLDER JOB
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { getLlama } from "node-llama-cpp";

const [folder, file] = process.argv.slice(2);
const job = JSON.parse(readFileSync(file, "utf8"));
const name = readdirSync(folder).find((name) => name.endsWith(".gguf"));
const llama = await getLlama({ gpu: false, build: "never" });
const model = await llama.loadModel({ modelPath: join(folder, name) });
const context = await model.createContext({ contextSize: 2048 });
const sequence = context.getSequence();
const answers = [];
for (const prompt of job.prompts) {
  await sequence.clearHistory();
  const answer = [];
  for await (const token of sequence.evaluate(prompt, { temperature: 0 })) {
    if (job.ends.includes(token)) break;
    answer.push(token);
    if (answer.length === job.max_new_tokens) break;
  }
  answers.push(answer);
}
const tokens = job.texts.map((text) => model.tokenize(text, true));
console.log(JSON.stringify({ tokens, answers, note: `\`${name}\`` }));
process.exit(0);
