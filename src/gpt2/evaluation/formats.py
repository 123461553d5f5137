"""Rows as their publishers, the hub or llm-foundry write them, made into what is scored.

Each function follows the prompt of lm-evaluation-harness's task of the same name, 0-shot, version as in `tasks.py`.
"""

import re

from gpt2.errors import UserError
from gpt2.evaluation.choices import Choices
from gpt2.evaluation.detokenize import detokenize_cbt, detokenize_lambada
from gpt2.evaluation.lambada import Passage
from gpt2.evaluation.records import Row, index_field, text_field, texts_field

_UPPER = {"A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their"}
_POSSESSIVE = {"my", "his", "her", "our", "their"}


def generic(row: Row) -> Choices:
    """{query, choices, gold}, or {context_options, continuation, gold} for partial scoring."""
    return _partial(row, " ") if "context_options" in row[1] else _foundry(row, text_field(row, "query"))


def _foundry(row: Row, query: str, delimiter: str = " ") -> Choices:
    choices = texts_field(row, "choices")
    return _choices(row, query, choices, index_field(row, "gold", len(choices)), delimiter)


def _choices(row: Row, query: str, choices: list[str], gold: int, delimiter: str = " ") -> Choices:
    """Choices after one query."""
    texts = tuple(delimiter + choice for choice in choices)
    return Choices((query,) * len(choices), texts, gold, tuple(map(len, choices)), row[0])


def _partial(row: Row, delimiter: str) -> Choices:
    options = texts_field(row, "context_options")
    rest = delimiter + text_field(row, "continuation")
    gold = index_field(row, "gold", len(options))
    return Choices(tuple(options), (rest,) * len(options), gold, (len(rest),) * len(options), row[0])


def _answer_key(row: Row, labels: list[str]) -> int:
    key = text_field(row, "answerKey").strip()
    if key not in labels:
        raise UserError(f"{row[0]}: the answerKey '{key}' is not one of its labels: {', '.join(labels)}")
    return labels.index(key)


def clean_hellaswag(text: str) -> str:
    """What the harness does to HellaSwag's texts: the brackets are artifacts of WikiHow."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag(row: Row) -> Choices:
    """ "Activity: context", then an ending."""
    endings = texts_field(row, "endings")
    if "lm_eval_query" in row[1]:  # cleaned already
        query = text_field(row, "lm_eval_query")
    else:
        context = f"{text_field(row, 'ctx_a')} {str(row[1].get('ctx_b') or '').capitalize()}"
        query = clean_hellaswag(f"{text_field(row, 'activity_label')}: {context}")
        endings = [clean_hellaswag(ending) for ending in endings]
    return _choices(row, query, endings, index_field(row, "label", len(endings)))


def hellaswag_completion(row: Row) -> Choices:
    """The context as it is, then a space and an ending as it is."""
    endings = texts_field(row, "endings")
    return _choices(row, text_field(row, "ctx"), endings, index_field(row, "label", len(endings)))


def lambada(row: Row) -> Passage:
    """The field `text`."""
    return Passage(text_field(row, "text"), row[0])


def lambada_original(row: Row) -> Passage:
    """The original, tokenized text, de-tokenized."""
    return Passage(detokenize_lambada(text_field(row, "text")).text, row[0])


def piqa(row: Row) -> Choices:
    if "goal" not in row[1]:
        return _foundry(row, f"{text_field(row, 'query').rstrip()}\nAnswer:")
    choices = [text_field(row, "sol1"), text_field(row, "sol2")]
    return _choices(row, f"Question: {text_field(row, 'goal')}\nAnswer:", choices, index_field(row, "label", 2))


def arc(row: Row) -> Choices:
    if "query" in row[1]:
        return _foundry(row, f"{text_field(row, 'query').rstrip()}\nAnswer:")
    question, choices, labels = _question(row, "question")
    return _choices(row, f"Question: {question}\nAnswer:", choices, _answer_key(row, labels))


def openbookqa(row: Row) -> Choices:
    if "query" in row[1]:
        return _foundry(row, text_field(row, "query"))
    question, choices, labels = _question(row, "question_stem")
    return _choices(row, question, choices, _answer_key(row, labels))


def _question(row: Row, name: str) -> tuple[str, list[str], list[str]]:
    """Question, choices and their labels: flat as on the hub, or nested as the Allen Institute publishes them."""
    where, record = row
    if isinstance(record.get("question"), dict):
        where, record = row = f"{where}, question", record["question"]
        listed, name = record.get("choices"), "stem"
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise UserError(f"{where}: 'choices' must be a list of objects")
        texts, labels = ([text_field((where, one), key) for one in listed] for key in ("text", "label"))
        return text_field(row, name), texts, labels
    choices = record.get("choices")
    if not isinstance(choices, dict):
        raise UserError(f"{where}: 'choices' must be an object with 'text' and 'label'")
    return text_field(row, name), texts_field((where, choices), "text"), texts_field((where, choices), "label")


def winogrande(row: Row) -> Choices:
    """Partial scoring (Trinh and Le 2018): the end of the sentence, after each of the two names."""
    if "context_options" in row[1]:
        return _partial(row, " ")
    sentence = text_field(row, "sentence")
    before, blank, after = sentence.partition("_")
    if not blank:
        raise UserError(f"{row[0]}: the sentence has no blank '_'")
    options = [before + text_field(row, name) for name in ("option1", "option2")]
    rest, gold = " " + after.strip(), text_field(row, "answer")
    if gold not in ("1", "2"):
        raise UserError(f"{row[0]}: 'answer' must be 1 or 2, not '{gold}'")
    return Choices(tuple(options), (rest, rest), int(gold) - 1, (len(rest),) * 2, row[0])


def wsc273(row: Row) -> Choices:
    """Partial scoring. The harness puts a space before a text that begins with one: so does this."""
    if "context_options" in row[1]:
        return _partial(row, "  ")
    text, pronoun = text_field(row, "text").replace("  ", " "), text_field(row, "pronoun")
    at = index_field(row, "pronoun_loc", len(text))
    options = [_referent(option, pronoun, text, at) for option in texts_field(row, "options")]
    rest = " " + text[at + len(pronoun) :]
    gold = index_field(row, "label", len(options))
    return Choices(
        tuple(text[:at] + one for one in options), (rest,) * len(options), gold, (len(rest),) * len(options), row[0]
    )


def _referent(option: str, pronoun: str, text: str, at: int) -> str:
    if pronoun.lower() in _POSSESSIVE:
        option += "'s"
    first = option.split()[0]
    starts = at >= 2 and text[at - 2] == "."
    return option.replace(first, first.lower()) if not starts and first in _UPPER else option


def copa(row: Row) -> Choices:
    """The premise and "because" or "therefore". The harness puts two spaces before a choice: so does this."""
    if "query" in row[1]:
        return _foundry(row, text_field(row, "query"), "  ")
    connectors, question = {"cause": "because", "effect": "therefore"}, text_field(row, "question")
    if question not in connectors:
        raise UserError(f"{row[0]}: 'question' must be cause or effect, not '{question}'")
    query = f"{text_field(row, 'premise').strip()[:-1]} {connectors[question]}"
    choices = [text_field(row, name) for name in ("choice1", "choice2")]
    choices = [choice[:1].lower() + choice[1:] for choice in choices]
    return _choices(row, query, choices, index_field(row, "label", 2), "  ")


def boolq(row: Row) -> Choices:
    query = f"{text_field(row, 'passage')}\nQuestion: {text_field(row, 'question')}?\nAnswer:"
    name = "label" if "label" in row[1] else "answer"
    return _choices(row, query, ["no", "yes"], index_field(row, name, 2))


def sciq(row: Row) -> Choices:
    support = str(row[1].get("support") or "").lstrip()
    query = f"{support}\nQuestion: {text_field(row, 'question')}\nAnswer:"
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    return _choices(row, query, [text_field(row, name) for name in names], 3)


def cbt(row: Row) -> Choices:
    """The paper's section 3.2: each of ten choices, scored together with the rest of the sentence after it."""
    sentences, options = texts_field(row, "sentences"), texts_field(row, "options")
    question, answer = text_field(row, "question"), text_field(row, "answer")
    if "XXXXX" not in question:
        raise UserError(f"{row[0]}: the question has no blank 'XXXXX'")
    if answer not in options:
        raise UserError(f"{row[0]}: the answer '{answer}' is not one of the options")
    before, _, after = question.partition("XXXXX")
    story = detokenize_cbt(" ".join(sentence.strip() for sentence in sentences)).text
    wholes = [detokenize_cbt(f"{before}{option}{after}".strip()).text for option in options]
    lead = detokenize_cbt(before.strip()).text
    shared = lead if all(whole.startswith(lead) for whole in wholes) else ""
    context = f"{story} {shared}".rstrip()
    texts = tuple(f" {whole[len(shared) :].lstrip()}" for whole in wholes)
    return Choices((context,) * len(options), texts, options.index(answer), tuple(map(len, options)), row[0])
