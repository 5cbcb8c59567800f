//! Columns of text.

/// Rows under headings, columns as wide as their widest cell.
pub fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = headings.map(|heading| heading.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: &[&str]| {
        let mut out = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            out.push_str(cell);
            out.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
        }
        text.push_str(out.trim_end());
        text.push('\n');
    };
    line(&headings);
    for row in rows {
        line(&row.each_ref().map(String::as_str));
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_line_up_and_lines_end_where_the_text_does() {
        let text = super::table(["A", "LONG"], &[["wide é".into(), "x".into()], ["y".into(), String::new()]]);
        assert_eq!(text, "A       LONG\nwide é  x\ny\n");
    }
}
