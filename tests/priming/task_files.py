"""Small files of every task, in its published format."""

import json


def jsonl(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


RECORD = {
    "source": "Daily mail",
    "passage": {
        "text": "Ann met Bob in Rome.\n@highlight\nAnn is a cook\n@highlight\nBob is late",
        "entities": [
            {"start": 0, "end": 2},
            {"start": 8, "end": 10},
            {"start": 15, "end": 18},
            {"start": 32, "end": 34},
        ],
    },
    "qas": [
        {
            "idx": {"passage": 0, "query": 0},
            "query": "The cook, @placeholder, waited.",
            "answers": [
                {"start": 0, "end": 2, "text": "Ann"},
                {"start": 32, "end": 34, "text": "ann"},
            ],
        },
        {"query": "@placeholder slept.", "answers": [{"start": 8, "end": 10, "text": "the Bob!"}]},
    ],
    "idx": 0,
}
HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof  shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["is using wrap.", "is ripping tiles.", "holds a cube.", "starts pulling."],
    "label": 3,
}
OPENBOOKQA = {
    "id": "8-343",
    "question": {
        "stem": "A person wants to start saving money so that they",
        "choices": [
            {"text": "make phone calls", "label": "A"},
            {"text": "quit eating lunch out.", "label": "B"},
        ],
    },
    "answerKey": "B",
}
COPA = {
    "premise": "My body cast a shadow over the grass.",
    "choice1": "The sun was rising.",
    "choice2": "I cut the grass.",
    "question": "cause",
    "label": 0,
    "idx": 0,
}
BOOLQ = {"question": "is it raining", "passage": "It pours. ", "idx": 0, "label": True}


# task -> (file name -> content, items as (candidates, right, alone))
CASES = {
    "record": (
        {"val.jsonl": jsonl(RECORD)},
        [
            (
                tuple(
                    "Ann met Bob in Rome.\n- Ann is a cook\n- Bob is late\n"
                    f"- The cook, {name}, waited."
                    for name in ("Ann", "Bob", "Rome")
                ),
                {0},
                (),
            ),
            (
                tuple(
                    f"Ann met Bob in Rome.\n- Ann is a cook\n- Bob is late\n- {name} slept."
                    for name in ("Ann", "Bob", "Rome")
                ),
                {1},
                (),
            ),
        ],
    ),
    "hellaswag": (
        {"data/hellaswag_val.jsonl": jsonl(HELLASWAG)},
        [
            (
                tuple(
                    f"Roof shingle removal: A man is sitting on a roof. He {ending}"
                    for ending in HELLASWAG["endings"]
                ),
                {3},
                (),
            )
        ],
    ),
    "piqa": (
        {
            "valid.jsonl": jsonl(
                {"goal": "Open a jar", "sol1": "Twist it.", "sol2": "Eat it."},
                {"goal": "Dry  hair", "sol1": "Use water.", "sol2": "Use a towel."},
            ),
            "valid-labels.lst": "0\n1\n",
        },
        [
            (("Open a jar Twist it.", "Open a jar Eat it."), {0}, ()),
            (("Dry  hair Use water.", "Dry  hair Use a towel."), {1}, ()),
        ],
    ),
    "winogrande": (
        {
            "winogrande_1.1/dev.jsonl": jsonl(
                {
                    "qID": "x-1",
                    "sentence": "The cup fits the box as the _ is small.",
                    "option1": "cup",
                    "option2": "box",
                    "answer": "1",
                }
            )
        },
        [
            (
                (
                    "The cup fits the box as the cup is small.",
                    "The cup fits the box as the box is small.",
                ),
                {0},
                (),
            )
        ],
    ),
    "storycloze": (
        {
            "cloze_test_test__spring2016 - cloze_test_ALL_test.csv": "InputStoryid,InputSentence1,"
            "InputSentence2,InputSentence3,InputSentence4,RandomFifthSentenceQuiz1,"
            "RandomFifthSentenceQuiz2,AnswerRightEnding\r\n"
            'a1,Rick grew up.,"He said ""No"", twice.",He ran.,He fell.,He is happy.,He won.,2\r\n'
        },
        [
            (
                (
                    'Rick grew up. He said "No", twice. He ran. He fell. He is happy.',
                    'Rick grew up. He said "No", twice. He ran. He fell. He won.',
                ),
                {1},
                (),
            )
        ],
    ),
    "openbookqa": (
        {"Data/Main/test.jsonl": jsonl(OPENBOOKQA)},
        [
            (
                (
                    "A person wants to start saving money so that they make phone calls.",
                    "A person wants to start saving money so that they quit eating lunch out.",
                ),
                {1},
                ("Answer: make phone calls.", "Answer: quit eating lunch out."),
            )
        ],
    ),
    "copa": (
        {"val.jsonl": jsonl(COPA, {**COPA, "question": "effect", "label": 1})},
        [
            (
                (
                    "My body cast a shadow over the grass because the sun was rising.",
                    "My body cast a shadow over the grass because I cut the grass.",
                ),
                {0},
                (),
            ),
            (
                (
                    "My body cast a shadow over the grass so the sun was rising.",
                    "My body cast a shadow over the grass so I cut the grass.",
                ),
                {1},
                (),
            ),
        ],
    ),
    "boolq": (
        {"val.jsonl": jsonl(BOOLQ)},
        [
            (
                (
                    "It pours.\nQuestion: is it raining?\nAnswer: yes",
                    "It pours.\nQuestion: is it raining?\nAnswer: no",
                ),
                {0},
                (),
            )
        ],
    ),
    "mnli": (
        {
            "dev_matched.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
            '0\tHe said "well.\tHe spoke.\tentailment\tentailment\n'
            "1\tA\tB\tneutral\t-\n"
            "2\tIt rains.\tIt snows.\tneutral\tneutral\n"
        },
        [
            (
                tuple(
                    f'He said "well.\nQuestion: He spoke. True, False, or Neither?\nAnswer: {word}'
                    for word in ("True", "False", "Neither")
                ),
                {0},
                (),
            ),
            (
                tuple(
                    f"It rains.\nQuestion: It snows. True, False, or Neither?\nAnswer: {word}"
                    for word in ("True", "False", "Neither")
                ),
                {2},
                (),
            ),
        ],
    ),
    "sst2": (
        {"SST-2/dev.tsv": 'sentence\tlabel\na " fine film \t1\nbad . \t0\n'},
        [
            (
                ('a " fine film All in all, it was bad', 'a " fine film All in all, it was good'),
                {1},
                (),
            ),
            (("bad . All in all, it was bad", "bad . All in all, it was good"), {0}, ()),
        ],
    ),
}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())  # line ends as they are
