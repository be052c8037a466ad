from bixse.evaluation.leakage import Leak, find_leaks


def test_the_same_text_under_another_id_is_found_whatever_its_spelling():
    evaluated = {"e1": "What is  BM25?", "e2": "ﬁle formats", "e3": "nothing like it"}
    trained = [("t1", "what is bm25?"), ("t2", "File formats"), ("t3", "something else")]
    assert find_leaks(evaluated, trained) == [
        Leak("e1", "t1", "What is  BM25?"),
        Leak("e2", "t2", "ﬁle formats"),
    ]


def test_every_leaked_query_is_named_once():
    evaluated = {"e1": "a b", "e2": "A B"}
    assert find_leaks(evaluated, [("t1", "a b"), ("t2", "a  b")]) == [
        Leak("e1", "t1", "a b"),
        Leak("e2", "t1", "A B"),
    ]


def test_no_leak():
    assert find_leaks({"e1": "a"}, []) == []
    assert find_leaks({}, [("t1", "a")]) == []
