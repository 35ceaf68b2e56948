"""Ten rows of each layout, written from the public descriptions of the formats, and what is read of
them: the prompt, the answers best first, and their ranks, scores or label."""


def user(text):
    return {"role": "user", "content": text}


def bot(text, **keys):
    return {"role": "assistant", "content": text} | keys


def system(text):
    return {"role": "system", "content": text}


def says(name, text):
    """A turn of ShareGPT."""
    return {"from": name, "value": text}


class Read:
    """What is read of a row."""

    def __init__(self, prompt, *answers, ranks=None, scores=None, label=None, options=None,
                 problem=""):
        self.prompt, self.answers = prompt, list(answers)
        self.ranks = ranks or list(range(len(answers)))
        self.scores, self.label, self.problem = scores, label, problem
        self.options = options or {}


def pair(chosen, rejected, **more):
    return {"chosen": chosen, "rejected": rejected} | more


TRL = [
    (pair(" sat", " ran", prompt="a cat"), Read("a cat", " sat", " ran")),
    (pair("", " ran", prompt="a cat"), Read("a cat", "", " ran")),
    (pair("The sky is blue.", "The sky is red."), Read("The sky is", " blue.", " red.")),
    (pair([bot("Blue.")], [bot("Red.")], prompt=[user("Sky?")]),
     Read([user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    (pair("Blue.", "Red.", prompt=[system("Be brief."), user("Sky?")]),
     Read([system("Be brief."), user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    (pair([user("Sky?"), bot("Blue.")], [user("Sky?"), bot("Red.")]),
     Read([user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    (pair([user("Sky?"), bot("Blue.")], [user("Sky?"), bot("Red.")], prompt="Sky?", prompt_id="7",
          messages=[user("Sky?"), bot("Blue.")], score_chosen=8.0, score_rejected=3.5),
     Read([user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    (pair([bot("Blue.")], [bot("Red.")], prompt="Sky?"),
     Read([user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    (pair('[{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]',
          "[{'role': 'user', 'content': 'Sky?'}, {'role': 'assistant', 'content': 'Red.'}]"),
     Read([user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    (pair([bot("Dry."), user("Sure?"), bot("Yes.")], [bot("Wet.")], prompt=[user("Rain?")]),
     Read([user("Rain?")], [bot("Dry."), user("Sure?"), bot("Yes.")], [bot("Wet.")])),
]


def hh(question, chosen, rejected, before=""):
    start = f"{before}\n\nHuman: {question}\n\nAssistant:"
    return pair(start + chosen, start + rejected), Read(start, chosen, rejected)


HH = [
    hh("Hi?", " Hello.", " Go away."),
    hh("Is it late?", " It is late.", " It is early."),
    hh("And now?", " Nine.", " No.", "\n\nHuman: Time?\n\nAssistant: Eight."),
    hh("Two lines?", " One\ntwo", " One"),
    hh("Empty?", "", " Yes."),
    hh("Quote \"this\".", " \"this\"", " that"),
    hh("Umlaut?", " Größe", " Grosse"),
    hh("Same start?", " Because it is so.", " Because I say so."),
    hh("More?", " a\n\nHuman: Why?\n\nAssistant: b", " c"),
    (pair("\n\nHuman: A?\n\nAssistant: Yes.", "\n\nHuman: B?\n\nAssistant: No."),
     Read("\n\nHuman:", " A?\n\nAssistant: Yes.", " B?\n\nAssistant: No.",
          problem="no turn of the assistant that both dialogues share")),
]

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}

SHAREGPT = [
    ({"conversations": [says("human", "Sky?")], "chosen": says("gpt", "Blue."),
      "rejected": says("gpt", "Red.")},
     Read([user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    ({"conversations": [says("human", "Sky?")], "chosen": [says("gpt", "Blue.")],
      "rejected": [says("gpt", "Red.")]},
     Read([user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    ({"conversations": [says("human", "Sky?")], "chosen": "Blue.", "rejected": "Red."},
     Read([user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    ({"conversations": [says("human", "Hi"), says("gpt", "Hello"), says("human", "Sky?")],
      "chosen": says("gpt", "Blue."), "rejected": says("gpt", "Red.")},
     Read([user("Hi"), bot("Hello"), user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    ({"conversations": [says("human", "Sky?")], "system": "Be brief.",
      "chosen": says("gpt", "Blue."), "rejected": says("gpt", "Red.")},
     Read([system("Be brief."), user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    ({"conversations": [says("system", "Be brief."), says("human", "Sky?")], "system": "",
      "chosen": says("gpt", "Blue."), "rejected": says("gpt", "Red.")},
     Read([system("Be brief."), user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    ({"conversations": [says("human", "Rain?")], "tools": '[{"type": "function", "function": '
      '{"name": "weather", "parameters": {}}}]',
      "chosen": says("function_call", '{"name": "weather", "arguments": {"city": "Oslo"}}'),
      "rejected": says("gpt", "No.")},
     Read([user("Rain?")], [bot(None, tool_calls=[CALL])], [bot("No.")],
          options={"tools": [WEATHER]})),
    ({"conversations": [
        says("human", "Rain?"),
        says("function_call", '{"name": "weather", "arguments": {"city": "Oslo"}}'),
        says("observation", "dry")],
      "chosen": says("gpt", "Dry."), "rejected": says("gpt", "Wet.")},
     Read([user("Rain?"), bot(None, tool_calls=[CALL]), {"role": "tool", "content": "dry"}],
          [bot("Dry.")], [bot("Wet.")])),
    ({"conversations": [user("Sky?")], "chosen": bot("Blue."), "rejected": bot("Red.")},
     Read([user("Sky?")], [bot("Blue.")], [bot("Red.")])),
    ({"conversations": '[{"from": "Human", "value": "Sky?"}]', "chosen": says("Assistant", "Blue."),
      "rejected": says("bot", "Red.")},
     Read([user("Sky?")], [bot("Blue.")], [bot("Red.")])),
]


def alpaca(instruction, **more):
    return pair("Blue.", "Red.", instruction=instruction, **more)


SKY = ([bot("Blue.")], [bot("Red.")])

ALPACA = [
    (alpaca("Sky?", input=""), Read([user("Sky?")], *SKY)),
    (alpaca("Which color?", input="the sky"), Read([user("Which color?\nthe sky")], *SKY)),
    (alpaca("Sky?", history=[]), Read([user("Sky?")], *SKY)),
    (alpaca("Sky?", history=[["Hi", "Hello"]]),
     Read([user("Hi"), bot("Hello"), user("Sky?")], *SKY)),
    (alpaca("Sky?", input="now", history=[["a", "b"], ["c", "d"]]),
     Read([user("a"), bot("b"), user("c"), bot("d"), user("Sky?\nnow")], *SKY)),
    (alpaca("Sky?", system="Be brief."), Read([system("Be brief."), user("Sky?")], *SKY)),
    ({"instruction": "Sky?", "input": "", "output": ["Blue.", "Red."]},
     Read([user("Sky?")], *SKY)),
    ({"instruction": "Color?", "input": "sky", "output": ["Blue.", "Red."]},
     Read([user("Color?\nsky")], *SKY)),
    ({"instruction": "Sky?", "output": ["Blue.", "Red."], "history": '[["Hi", "Hello"]]'},
     Read([user("Hi"), bot("Hello"), user("Sky?")], *SKY)),
    (alpaca("", input="Sky?"), Read([user("Sky?")], *SKY)),
]

KTO = [
    ({"prompt": "Sky?", "completion": " Blue.", "label": True}, Read("Sky?", " Blue.", label=True)),
    ({"prompt": "Sky?", "completion": " Red.", "label": False}, Read("Sky?", " Red.", label=False)),
    ({"prompt": "Sky?", "completion": " Red.", "label": "false"},
     Read("Sky?", " Red.", label=False)),
    ({"prompt": "Sky?", "completion": " Blue.", "label": 1}, Read("Sky?", " Blue.", label=True)),
    ({"prompt": [user("Sky?")], "completion": [bot("Red.")], "label": 0},
     Read([user("Sky?")], [bot("Red.")], label=False)),
    ({"messages": [user("Sky?"), bot("Blue.")], "label": "True"},
     Read([user("Sky?")], [bot("Blue.")], label=True)),
    ({"messages": [user("Hi"), bot("Hello"), user("Sky?"), bot("Red.")], "kto_tag": False},
     Read([user("Hi"), bot("Hello"), user("Sky?")], [bot("Red.")], label=False)),
    ({"conversations": [says("human", "Sky?"), says("gpt", "Blue.")], "kto_tag": True,
      "system": "Be brief."},
     Read([system("Be brief."), user("Sky?")], [bot("Blue.")], label=True)),
    ({"instruction": "Color?", "input": "sky", "output": "Red.", "kto_tag": False},
     Read([user("Color?\nsky")], [bot("Red.")], label=False)),
    ({"completion": [user("Sky?"), bot("Blue.")], "label": "1"},
     Read([user("Sky?")], [bot("Blue.")], label=True)),
]

RANKED = [
    ({"prompt": "Sky?", "responses": ["Blue.", "Red."]}, Read("Sky?", "Blue.", "Red.")),
    ({"prompt": "Sky?", "responses": ["a", "b", "c", "d"]}, Read("Sky?", "a", "b", "c", "d")),
    ({"prompt": "Sky?", "responses": '["Blue.", "Red."]'}, Read("Sky?", "Blue.", "Red.")),
    ({"prompt": "Sky?", "responses": "['Blue.', 'Red.']"}, Read("Sky?", "Blue.", "Red.")),
    ({"prompt": [user("Sky?")], "responses": ["Blue.", "Red.", "No."]},
     Read([user("Sky?")], *SKY, [bot("No.")])),
    ({"prompt": [user("Sky?")], "responses": [[bot("Blue.")], [bot("Red.")]]},
     Read([user("Sky?")], *SKY)),
    ({"prompt": "Sky?", "responses": [[bot("Blue.")], [bot("Red.")]]},
     Read([user("Sky?")], *SKY)),
    ({"prompt": "Sky?", "responses": ["b", "c", "a"], "ranks": [2, 3, 1]},
     Read("Sky?", "a", "b", "c")),
    ({"prompt": "Sky?", "responses": ["b", "a", "b2"], "ranks": [2, 1, 2]},
     Read("Sky?", "a", "b", "b2", ranks=[0, 1, 1])),
    ({"prompt": [system("Be brief."), user("Sky?")], "responses": ["Blue.", "Red."]},
     Read([system("Be brief."), user("Sky?")], *SKY)),
]


def completion(text, **more):
    return {"response": text, "model": "m", "critique": "c", "principle": "helpfulness"} | more


def rated(text, *ratings):
    notes = [{"Rating": rating, "Rationale": "r"} for rating in ratings]
    return completion(text, annotations=dict(zip(("helpfulness", "honesty"), notes)))


SCORED = [
    ({"prompt": "Sky?", "responses": ["b", "a"], "scores": [1, 2.5]},
     Read("Sky?", "a", "b", scores=[2.5, 1])),
    ({"prompt": "Sky?", "responses": ["a", "c", "b", "b2"], "scores": [9, -1, 3, 3]},
     Read("Sky?", "a", "b", "b2", "c", ranks=[0, 1, 1, 2], scores=[9, 3, 3, -1])),
    ({"prompt": [user("Sky?")], "completions": ["Red.", "Blue."], "scores": ["0.1", "1e1"]},
     Read([user("Sky?")], *SKY, scores=[10, 0.1])),
    # UltraFeedback
    ({"source": "sharegpt", "instruction": "Sky?", "models": ["m", "n"], "completions": [
        completion("b", overall_score=4.0), completion("a", overall_score=8.5)]},
     Read("Sky?", "a", "b", scores=[8.5, 4])),
    ({"instruction": "Sky?", "completions": [
        completion("a", **{"fine-grained_score": 4.25}),
        completion("b", **{"fine-grained_score": 2})]}, Read("Sky?", "a", "b", scores=[4.25, 2])),
    ({"instruction": "Sky?", "completions": [rated("b", "1", "2"), rated("a", "4", "5")]},
     Read("Sky?", "a", "b", scores=[4.5, 1.5])),
    # distilabel
    ({"instruction": "Sky?", "generations": ["b", "a"], "ratings": [2.0, 5.0],
      "rationales": ["r", "s"]}, Read("Sky?", "a", "b", scores=[5, 2])),
    ({"input": "Sky?", "generations": ["a", "b"], "rating": [9.0, 7.0], "order": ["x", "y"]},
     Read("Sky?", "a", "b", scores=[9, 7])),
    # Nectar
    ({"prompt": "\n\nHuman: Sky?\n\nAssistant: ", "turns": 1, "num_responses": 3, "answers": [
        {"answer": "b", "model": "m", "rank": 2.0}, {"answer": "c", "model": "n", "rank": 3.0},
        {"answer": "a", "model": "o", "rank": 1.0}], "good_natured": True},
     Read("\n\nHuman: Sky?\n\nAssistant: ", "a", "b", "c")),
    ({"prompt": "Sky?", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
     Read("Sky?", "a", "b")),
]


def safe(better, **more):
    return {"prompt": "Sky?", "response_0": "r0", "response_1": "r1", "better_response_id": better,
            "safer_response_id": 1 - better, "is_response_0_safe": True} | more


def shp(label):
    return {"history": "Sky?", "human_ref_A": "A", "human_ref_B": "B", "labels": label,
            "score_A": 3 + label, "score_B": 4 - label, "domain": "askscience_test",
            "upvote_ratio": 0.9, "post_id": "x", "score_ratio": 2.0}


def helpsteer(preference):
    return {"domain": "general", "language": "english", "context": [user("Sky?")],
            "response1": "one", "response2": "two", "overall_preference": preference,
            "individual_preference": [{"score": preference, "reasoning": "r", "feedback": "f"}]}


def arena(winner):
    return {"question_id": "q", "model_a": "m", "model_b": "n", "winner": winner, "judge": "j",
            "conversation_a": [user("Sky?"), bot("A")], "conversation_b": [user("Sky?"), bot("B")],
            "turn": 1, "language": "English"}


def webgpt(first, second):
    return {"question": {"dataset": "eli5", "id": "1", "full_text": "Sky?"}, "answer_0": "a0",
            "answer_1": "a1", "score_0": first, "score_1": second,
            "quotes_0": {"title": ["t"], "extract": ["e"]}, "tokens_0": {"prefix": [1]}}


TLDR = {
    "info": {"id": "t3", "post": "It is blue.", "title": "Sky", "subreddit": "pics", "site": None,
             "article": None},
    "summaries": [{"text": " Blue.", "policy": "sup4"}, {"text": " Sky blue.", "policy": "ref"}],
    "choice": 1, "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 2},
}

LABELLED_PAIR = [
    (safe(0), Read("Sky?", "r0", "r1")),
    (safe(1), Read("Sky?", "r1", "r0")),
    (shp(1), Read("Sky?", "A", "B", scores=[4, 3])),
    (shp(0), Read("Sky?", "B", "A", scores=[4, 3])),
    (helpsteer(-2), Read([user("Sky?")], [bot("one")], [bot("two")])),
    (helpsteer(3), Read([user("Sky?")], [bot("two")], [bot("one")])),
    (arena("model_b"), Read([user("Sky?")], [bot("B")], [bot("A")])),
    (arena("tie (bothbad)"),
     Read([user("Sky?")], [bot("A")], [bot("B")], ranks=[0, 0], problem="ties only")),
    (webgpt(-0.5, 0.5), Read("Sky?", "a1", "a0", scores=[0.5, -0.5])),
    (TLDR, Read("SUBREDDIT: r/pics\n\nTITLE: Sky\n\nPOST: It is blue.\n\nTL;DR:", " Sky blue.",
                " Blue.")),
]


def openai(messages, chosen, rejected, **given):
    return {"input": {"messages": messages} | given, "preferred_output": chosen,
            "non_preferred_output": rejected}


OPENAI = [
    (openai([user("Sky?")], [bot("Blue.")], [bot("Red.")], tools=[], parallel_tool_calls=True),
     Read([user("Sky?")], *SKY)),
    (openai([system("Be brief."), user("Sky?")], [bot("Blue.")], [bot("Red.")]),
     Read([system("Be brief."), user("Sky?")], *SKY)),
    (openai([user("Hi"), bot("Hello"), user("Sky?")], [bot("Blue.")], [bot("Red.")]),
     Read([user("Hi"), bot("Hello"), user("Sky?")], *SKY)),
    (openai([user("Rain?")], [bot(None, tool_calls=[CALL])], [bot("No.")], tools=[WEATHER]),
     Read([user("Rain?")], [bot(None, tool_calls=[CALL])], [bot("No.")],
          options={"tools": [WEATHER]})),
    (openai([user([{"type": "text", "text": "Sky?"}])], [bot("Blue.")], [bot("Red.")]),
     Read([user([{"type": "text", "text": "Sky?"}])], *SKY)),
    (openai([user("Sky?") | {"name": "ann"}], [bot("Blue.")], [bot("Red.")]),
     Read([user("Sky?") | {"name": "ann"}], *SKY)),
    (openai([user("Sky?")], [bot("Blue.", train=True)], [bot("Red.")]),
     Read([user("Sky?")], [bot("Blue.", train=True)], [bot("Red.")])),
    (openai([{"role": "developer", "content": "d"}, user("Sky?")], [bot("Blue.")], [bot("Red.")]),
     Read([{"role": "developer", "content": "d"}, user("Sky?")], *SKY)),
    (openai([user("Sky?")], [bot("Blue."), user("Sure?"), bot("Yes.")], [bot("Red.")]),
     Read([user("Sky?")], [bot("Blue."), user("Sure?"), bot("Yes.")], [bot("Red.")])),
    ({"input": '{"messages": [{"role": "user", "content": "Sky?"}]}',
      "preferred_output": '[{"role": "assistant", "content": "Blue."}]',
      "non_preferred_output": '[{"role": "assistant", "content": "Red."}]'},
     Read([user("Sky?")], *SKY)),
]


def orca(text, chosen="Blue.", rejected="Red.", name="question", **more):
    return pair(chosen, rejected, system=text, **{name: "Sky?"}, **more)


BRIEF = Read([system("Be brief."), user("Sky?")], *SKY)

ORCA = [
    (orca("Be brief."), BRIEF),
    (orca(""), Read([user("Sky?")], *SKY)),
    (orca(" "), Read([user("Sky?")], *SKY)),
    (orca(None), Read([user("Sky?")], *SKY)),
    (orca("Be brief.", "Blue.\n", "Red."),
     Read([system("Be brief."), user("Sky?")], [bot("Blue.\n")], [bot("Red.")])),
    (orca("Be brief.", id="flan.1"), BRIEF),
    (orca("Be brief.", name="input"), BRIEF),
    (orca("", name="input"), Read([user("Sky?")], *SKY)),
    (orca("Be brief.", status="tie", in_gsm8k_train=False), BRIEF),
    (orca("Sei kurz, größer."), Read([system("Sei kurz, größer."), user("Sky?")], *SKY)),
]

SEVERAL_REJECTED = [
    (pair("a", ["b", "c"], prompt="Sky?"), Read("Sky?", "a", "b", "c", ranks=[0, 1, 1])),
    (pair("a", ["b"], prompt="Sky?"), Read("Sky?", "a", "b")),
    (pair("a", ["b", "c", "d"], prompt="Sky?"),
     Read("Sky?", "a", "b", "c", "d", ranks=[0, 1, 1, 1])),
    (pair("Blue.", ["Red.", "No."], prompt=[user("Sky?")]),
     Read([user("Sky?")], *SKY, [bot("No.")], ranks=[0, 1, 1])),
    (pair([bot("Blue.")], [[bot("Red.")], [bot("No.")]], prompt=[user("Sky?")]),
     Read([user("Sky?")], *SKY, [bot("No.")], ranks=[0, 1, 1])),
    (pair([bot("Blue.")], ["Red.", "No."], prompt=[user("Sky?")]),
     Read([user("Sky?")], *SKY, [bot("No.")], ranks=[0, 1, 1])),
    (pair([user("Sky?"), bot("Blue.")], [[user("Sky?"), bot("Red.")], [user("Sky?"), bot("No.")]]),
     Read([user("Sky?")], *SKY, [bot("No.")], ranks=[0, 1, 1])),
    (pair("The sky is blue.", ["The sky is red.", "The sky was red."]),
     Read("The sky", " is blue.", " is red.", " was red.", ranks=[0, 1, 1])),
    (pair([bot("Blue.")], [[bot("Red.")]], prompt="Sky?"), Read([user("Sky?")], *SKY)),
    (pair("a", ["b", "b"], prompt="Sky?"), Read("Sky?", "a", "b", "b", ranks=[0, 1, 1])),
]

ROWS = {
    "trl": TRL, "hh": HH, "sharegpt": SHAREGPT, "alpaca": ALPACA, "kto": KTO, "ranked": RANKED,
    "scored": SCORED, "labelled_pair": LABELLED_PAIR, "openai": OPENAI, "orca": ORCA,
    "several_rejected": SEVERAL_REJECTED,
}
