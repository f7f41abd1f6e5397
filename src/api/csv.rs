//! Tables as text (RFC 4180), in and out.
//!
//! A spreadsheet runs a cell that begins with `=`, `+`, `-`, `@`, a tab or a carriage return, whoever has
//! written it. Such a cell is written with an apostrophe before it, which reading takes off again.

pub const CSV: &str = "text/csv";

/// What a spreadsheet takes for the beginning of a formula; and the apostrophe itself, so that one that
/// was there is told from one that was added.
const RISKY: [char; 7] = ['=', '+', '-', '@', '\t', '\r', '\''];

/// Reads the lines of a table, which may end with LF or CRLF.
/// `None` if a quote is not closed or stands within a cell.
pub fn read(text: &str) -> Option<Vec<Vec<String>>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text).replace("\r\n", "\n");
    let mut rest = text.strip_suffix('\r').unwrap_or(&text);
    let (mut lines, mut line) = (Vec::new(), Vec::new());
    loop {
        let (cell, behind) = read_cell(rest)?;
        line.push(without_apostrophe(&cell));
        let mut chars = behind.chars();
        match chars.next() {
            Some(',') => {}
            Some('\n') | None => lines.push(std::mem::take(&mut line)),
            Some(_) => return None,
        }
        if behind.is_empty() {
            return Some(lines);
        }
        rest = chars.as_str();
    }
}

/// A cell, and what stands behind it.
fn read_cell(text: &str) -> Option<(String, &str)> {
    let Some(mut rest) = text.strip_prefix('"') else {
        let (cell, behind) = text.split_at(text.find([',', '\n']).unwrap_or(text.len()));
        return (!cell.contains('"')).then(|| (cell.to_owned(), behind));
    };
    let mut cell = String::new();
    loop {
        let (before, after) = rest.split_once('"')?;
        cell.push_str(before);
        let Some(more) = after.strip_prefix('"') else { return Some((cell, after)) };
        cell.push('"');
        rest = more;
    }
}

fn without_apostrophe(cell: &str) -> String {
    let plain = cell.strip_prefix('\'').filter(|rest| rest.starts_with(RISKY));
    plain.unwrap_or(cell).to_owned()
}

pub fn line(cells: &[&str]) -> String {
    let cells: Vec<String> = cells.iter().map(|cell| written(cell)).collect();
    cells.join(",") + "\r\n"
}

fn written(cell: &str) -> String {
    let safe = if cell.starts_with(RISKY) { format!("'{cell}") } else { cell.to_owned() };
    match safe.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", safe.replace('"', "\"\"")),
        false => safe,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[&[&str]]) {
        let lines = read(text).unwrap_or_else(|| panic!("{text:?}"));
        let lines: Vec<Vec<&str>> =
            lines.iter().map(|line| line.iter().map(String::as_str).collect()).collect();
        assert_eq!(lines, expected, "{text:?}");
    }

    #[test]
    fn tables_as_people_and_spreadsheets_write_them() {
        check("", &[&[""]]);
        check("a", &[&["a"]]);
        check("a,b\n\nc,d\n", &[&["a", "b"], &[""], &["c", "d"], &[""]]);
        check("\u{feff}a,b\r\nc,\r\n", &[&["a", "b"], &["c", ""], &[""]]);
        check("a,b\nc,", &[&["a", "b"], &["c", ""]]);
        check("\"a,\"\"b\"\"\nc\",d", &[&["a,\"b\"\nc", "d"]]);
        check(",\n,x", &[&["", ""], &["", "x"]]);
        check("'=1+1,'x,''=,'", &[&["=1+1", "'x", "'=", "'"]]);
        for bad in ["\"", "\"a", "a\"b", "\"a\"b", "a,\"b\"c\n"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn what_is_written_reads_back_and_runs_in_no_spreadsheet() {
        let cells = [
            "device-1",
            "=HYPERLINK(\"http://x\")",
            "+1",
            "-1",
            "@SUM(A1)",
            "\tx",
            "\rx",
            "'=x",
            "'",
            "a,b",
            "a\nb",
            "\"",
            "",
        ];
        let text = line(&cells);
        for cell in text.trim_end().split(',') {
            let shown = cell.trim_start_matches('"');
            assert!(!shown.starts_with(['=', '+', '-', '@', '\t', '\r']), "{cell:?}");
        }
        let back = read(text.trim_end()).unwrap();
        assert_eq!(back, [cells.map(str::to_owned)]);
    }
}
