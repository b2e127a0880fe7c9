//! Which of the words that are known somebody meant who wrote another.

/// The candidate most like `word`, if it is like it at all: at most a third of its letters differ.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = candidates.into_iter().map(|candidate| (distance(word, candidate), candidate));
    let (differences, candidate) = near.min()?;
    (differences <= candidate.len().max(3) / 3).then_some(candidate)
}

/// What is told to whoever wrote `word` where one of `known` belongs: `expected mesh, local or off; did
/// you mean 'mesh'?`.
pub fn expected_one_of(word: &str, known: &[&str]) -> String {
    let all = match known {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => known.join(""),
    };
    match nearest(word, known.iter().copied()) {
        Some(near) => format!("expected {all}; did you mean '{near}'?"),
        None => format!("expected {all}"),
    }
}

/// Letters to change, add, drop or swap with their neighbour to make one word the other (optimal
/// string alignment), by rows.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    // The row of two letters ago, of the last letter, of this one.
    let mut rows = [Vec::new(), (0..=b.len()).collect::<Vec<usize>>(), vec![0; b.len() + 1]];
    for (i, left) in a.iter().enumerate() {
        let [earlier, last, row] = &mut rows;
        row[0] = i + 1;
        for (j, right) in b.iter().enumerate() {
            let changed = last[j] + usize::from(left != right);
            row[j + 1] = changed.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *left == b[j - 1] && a[i - 1] == *right {
                row[j + 1] = row[j + 1].min(earlier[j - 1] + 1);
            }
        }
        rows.rotate_left(1);
        rows[2].resize(b.len() + 1, 0);
    }
    rows[1][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_slips_is_told_all_words_and_the_nearest() {
        let known = ["mesh", "local", "off"];
        let told = expected_one_of("mash", &known);
        assert_eq!(told, "expected mesh, local or off; did you mean 'mesh'?");
        assert_eq!(expected_one_of("colour", &known), "expected mesh, local or off");
        assert_eq!(expected_one_of("x", &["v2"]), "expected v2");
    }

    #[test]
    fn distance_counts_changes_additions_losses_and_swaps() {
        for (a, b, expected) in [
            ("", "", 0),
            ("a", "", 1),
            ("", "ab", 2),
            ("kitten", "sitting", 3),
            ("nmae", "name", 1),
            ("abcd", "badc", 2),
            ("abc", "cab", 2),
        ] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }
}
