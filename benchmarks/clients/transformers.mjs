// Token ids and greedy answers of transformers.js in Node: FOLDER JOB
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, Tensor, env } from "@huggingface/transformers";

const [folder, file] = process.argv.slice(2);
const job = JSON.parse(readFileSync(file, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = `${dirname(folder)}/`;
const name = basename(folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { dtype: "q4", subfolder: "" });
const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const answers = [];
for (const prompt of job.prompts) {
  const inputs = { input_ids: row(prompt), attention_mask: row(prompt.map(() => 1)) };
  const output = await model.generate({
    ...inputs,
    max_new_tokens: job.max_new_tokens,
    do_sample: false,
  });
  answers.push(output.tolist()[0].slice(prompt.length).map(Number));
}
const tokens = job.texts.map((text) => tokenizer.encode(text, { add_special_tokens: false }));
console.log(JSON.stringify({ tokens, answers }));
process.exit(0);
