"""A generated world whose reward is known exactly, and the demo on it. The top floor: only `cli` imports it.

- `worlds`: prompts, responses, preference pairs and their gold reward; `text` has the words.
- `backbone`: the tokenizer and small Llama made from that text.
- `policy`: the world as policy and gold reward of best-of-n (`attack`).
- `demo`: the whole job on it; `stages` is what it says while it works, `demo_report` its page and table.
"""
