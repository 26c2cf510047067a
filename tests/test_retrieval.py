import pytest

from aipo_graph.errors import TaskError
from aipo_graph.tools.retrieval import Corpus, Document

RULES = Corpus([Document(letter, f"operator {letter}: key {key}") for letter, key in zip("ABIabi", (11, 22, 33, 44, 55, 66), strict=True)])


def ids(corpus, query, k=1):
    return [document.id for document in corpus.search(query, k)]


@pytest.mark.parametrize("letter", "ABIabi")
@pytest.mark.parametrize("query", ["{}", " {} ", "rule of {}?", "operator {}", "({})", "what is the key of `{}`"])
def test_a_one_letter_id_is_found_with_its_case(letter, query):
    assert ids(RULES, query.format(letter)) == [letter]


def test_ids_with_spaces_and_signs_are_found():
    corpus = Corpus([Document("baker's dozen", "13"), Document("add-1", "one more"), Document("dozen", "12")])
    assert ids(corpus, "baker's dozen") == ["baker's dozen"]
    assert ids(corpus, "what does add-1 do?") == ["add-1"]


def test_nothing_in_common_finds_nothing():
    assert ids(RULES, "unheard of") == ids(RULES, "") == ids(RULES, "?!") == []


def test_a_word_in_half_of_two_documents_still_finds_its_document():
    assert ids(Corpus([Document("1", "red apple"), Document("2", "green pear")]), "pear", 2) == ["2"]


def test_ties_keep_the_order_of_the_corpus_and_k_bounds_the_answer():
    corpus = Corpus([Document(str(n), "same words") for n in range(20)])
    assert ids(corpus, "words", 5) == ["0", "1", "2", "3", "4"]
    assert ids(corpus, "words", 50) == [str(n) for n in range(20)]


def test_common_words_count():
    assert ids(Corpus([Document("1", "to be or not"), Document("2", "question")]), "the to a or") == ["1"]


def test_only_the_start_of_a_long_query_is_read():
    assert ids(RULES, "z " * 1000 + "B") == []


def test_a_file_is_read_with_its_other_fields(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "B", "text": "subtracts 12", "kind": "-"}\n\n{"id": "C", "text": "adds 3"}\n')
    corpus = Corpus.read(path)
    assert corpus.search("B") == [Document("B", "subtracts 12", {"kind": "-"})]
    assert [document.id for document in corpus.documents] == ["B", "C"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "A", "text": "a"}\n{"id": "B"', ":2: not a JSON record"),
        ('{"id": "A", "text": "a"}\n{"id": "B"}', ":2: field 'text' is missing"),
        ('{"id": 7, "text": "a"}', ":1: field 'id' is 7, not text"),
        ('{"id": "A", "text": " "}', ":1: field 'text'"),
        ('{"id": "A", "text": "a"}\n\n{"id": "A", "text": "b"}', ":3: the id 'A' stands twice"),
        ('{"id": "A", "id": "B", "text": "a"}', ":1: not a JSON record .a key stands twice"),
        ('{"id": "A", "text": "a", "x": NaN}', ":1: not a JSON record .NaN"),
        ("[" * 100_000, ":1: not a JSON record"),
        ('["A"]', ":1: a JSON object is expected, not list"),
        (b"\xff\xfe", ":1: not UTF-8"),
        ("", "no records"),
        ("\n \n", "no records"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_line(tmp_path, content, message):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TaskError, match=rf"corpus\.jsonl.*{message}"):
        Corpus.read(path)


def test_a_missing_file_and_an_empty_corpus_are_refused(tmp_path):
    with pytest.raises(TaskError, match=r"nowhere\.jsonl: cannot be read"):
        Corpus.read(tmp_path / "nowhere.jsonl")
    with pytest.raises(TaskError, match="without documents"):
        Corpus([])
