"""Small files of StereoSet and CrowS-Pairs."""


def element(domain, target, context, stereotype, contrary, unrelated):
    texts = {"anti-stereotype": contrary, "unrelated": unrelated, "stereotype": stereotype}
    return {
        "id": "x",
        "target": target,
        "bias_type": domain,
        "context": context,
        "sentences": [
            {"id": "y", "sentence": text, "labels": [], "gold_label": label}
            for label, text in texts.items()
        ],
    }


STEREOSET = {
    "version": "1.0",
    "data": {
        "intersentence": [
            element("race", "w1", "He is w1.", "It was w2.", "It was w3.", "It was w4 w4 w4.")
        ],
        "intrasentence": [
            element("gender", "w5", "w5 is BLANK.", "w5 is w6.", "w5 is w7.", "w5 is w8."),
            element("gender", "w9", "w9 is BLANK.", "w9 is w6.", "w9 is w7.", "w9 is w8."),
        ],
    },
}
CROWS = """,sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer,anon_annotators
0,"w1 is w2, and w3.","w4 is w2, and w3.",stereo,race-color,"[['race-color']]",a1,"['a1']"
1,w5 it was.,w6 it was.,antistereo,gender,"[['gender']]",a1,"['a1']"
"""
