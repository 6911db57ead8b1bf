//! Keeps links of an HTML page below a prefix, piece by piece as the page arrives.

/// Attributes that hold one URL (HTML 4 and HTML living standard), with the elements that have them.
const LINKS: &[(&str, &[&str])] = &[
    ("action", &["form"]),
    ("cite", &["blockquote", "del", "ins", "q"]),
    ("data", &["object"]),
    ("formaction", &["button", "input"]),
    ("href", &["a", "area", "base", "link"]),
    ("longdesc", &["frame", "iframe", "img"]),
    ("manifest", &["html"]),
    ("poster", &["video"]),
    ("src", &["audio", "embed", "frame", "iframe", "img", "input", "script", "source", "track", "video"]),
];

/// Elements whose content is text, whatever it looks like.
const RAW: &[&str] = &["script", "style", "textarea", "title"];

/// A tag longer than this is passed on as it is.
const LONGEST_TAG: usize = 64 << 10;

/// Rewrites a page that arrives in pieces.
#[derive(Debug)]
pub struct Rewriter {
    prefix: String,
    host: String,
    pending: Vec<u8>,
    /// What ends the text that is passed over, in lower case.
    until: Option<String>,
}

impl Rewriter {
    /// For links to `host` and links without a host, which are to begin with `prefix`.
    pub fn new(prefix: String, host: String) -> Rewriter {
        Rewriter { prefix, host, pending: Vec::new(), until: None }
    }

    /// Takes the next piece and returns what can be passed on.
    pub fn push(&mut self, piece: &[u8]) -> Vec<u8> {
        self.pending.extend_from_slice(piece);
        let mut out = Vec::with_capacity(self.pending.len());
        let mut from = 0;
        loop {
            let rest = &self.pending[from..];
            if let Some(end) = &self.until {
                match find(rest, end.as_bytes()) {
                    Some(at) => {
                        out.extend_from_slice(&rest[..at]);
                        from += at;
                        self.until = None;
                    }
                    None => {
                        let sure = rest.len().saturating_sub(end.len() - 1);
                        out.extend_from_slice(&rest[..sure]);
                        from += sure;
                        break;
                    }
                }
                continue;
            }
            let text = rest.iter().position(|b| *b == b'<').unwrap_or(rest.len());
            out.extend_from_slice(&rest[..text]);
            from += text;
            let rest = &rest[text..];
            if rest.is_empty() || (rest.len() < 4 && b"<!--".starts_with(rest)) {
                break;
            }
            if rest.starts_with(b"<!--") {
                out.extend_from_slice(b"<!--");
                from += 4;
                self.until = Some("-->".to_owned());
                continue;
            }
            let Some(length) = tag_length(rest) else {
                if rest.len() > LONGEST_TAG {
                    out.extend_from_slice(rest);
                    from = self.pending.len();
                }
                break;
            };
            let tag = &rest[..length];
            let name = tag_name(tag);
            if RAW.contains(&name.as_str()) {
                self.until = Some(format!("</{name}"));
            }
            rewrite_tag(tag, &name, &self.prefix, &self.host, &mut out);
            from += length;
        }
        self.pending.drain(..from);
        out
    }

    /// What is left at the end of the page.
    pub fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.pending)
    }
}

/// The URL below `prefix`, if it is one that has to be changed: absolute on the same host, or beginning with a slash.
pub fn rewritten(url: &str, prefix: &str, host: &str) -> Option<String> {
    let after_host = |text: &str| -> Option<String> {
        let rest = text.strip_prefix(host)?;
        (rest.is_empty() || rest.starts_with(['/', '?', '#'])).then(|| rest.to_owned())
    };
    let scheme = ["http:", "https:"].iter().find_map(|s| {
        let (given, rest) = url.split_at_checked(s.len())?;
        given.eq_ignore_ascii_case(s).then_some(rest)
    });
    let path = match scheme.unwrap_or(url).strip_prefix("//") {
        Some(authority) => after_host(authority)?,
        None if scheme.is_none() && url.starts_with('/') => url.to_owned(),
        None => return None,
    };
    let there = path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?', '#']));
    if there { (path != url).then_some(path) } else { Some(format!("{prefix}{path}")) }
}

fn find(text: &[u8], lower: &[u8]) -> Option<usize> {
    text.windows(lower.len()).position(|window| window.eq_ignore_ascii_case(lower))
}

/// Length of the tag that begins here, its `>` included; `None` while that is not there.
fn tag_length(text: &[u8]) -> Option<usize> {
    // What is no tag after all is text: `<` alone is passed on.
    if !text.get(1)?.is_ascii_alphabetic() && !matches!(text[1], b'/' | b'!' | b'?') {
        return Some(1);
    }
    let mut quote = None;
    let mut value = false;
    for (at, byte) in text.iter().enumerate().skip(1) {
        match (quote, byte) {
            (Some(open), _) if open == *byte => quote = None,
            (Some(_), _) => {}
            (None, b'>') => return Some(at + 1),
            (None, b'"' | b'\'') if value => quote = Some(*byte),
            _ => {}
        }
        // A quote opens a value only right after its `=`.
        value = *byte == b'=' || (value && byte.is_ascii_whitespace());
    }
    None
}

fn tag_name(tag: &[u8]) -> String {
    let name = tag.iter().skip(1).take_while(|b| b.is_ascii_alphanumeric() || **b == b'-');
    name.map(|b| b.to_ascii_lowercase() as char).collect()
}

fn rewrite_tag(tag: &[u8], name: &str, prefix: &str, host: &str, out: &mut Vec<u8>) {
    let mut at = 1 + name.len();
    let mut copied = 0;
    let skip = |mut at: usize, what: fn(u8) -> bool| {
        while tag.get(at).is_some_and(|b| what(*b)) {
            at += 1;
        }
        at
    };
    let end = tag.len().saturating_sub(1);
    while !name.is_empty() && at < end {
        at = skip(at, |b| b.is_ascii_whitespace() || b == b'/');
        let from = at;
        at = skip(at, |b| !b.is_ascii_whitespace() && !matches!(b, b'=' | b'>' | b'/'));
        let attribute = String::from_utf8_lossy(&tag[from..at]).to_ascii_lowercase();
        at = skip(at, |b| b.is_ascii_whitespace());
        if tag.get(at) != Some(&b'=') {
            if attribute.is_empty() {
                break;
            }
            continue;
        }
        at = skip(at + 1, |b| b.is_ascii_whitespace());
        let (from, to) = match tag.get(at) {
            Some(quote @ (b'"' | b'\'')) => {
                let from = at + 1;
                let to = tag[from..].iter().position(|b| b == quote).map_or(end, |n| from + n);
                at = to + 1;
                (from, to)
            }
            _ => {
                let from = at;
                at = skip(at, |b| !b.is_ascii_whitespace() && b != b'>');
                (from, at)
            }
        };
        let link = LINKS.iter().any(|(known, elements)| *known == attribute && elements.contains(&name));
        if link
            && let Ok(url) = std::str::from_utf8(&tag[from..to])
            && let Some(url) = rewritten(url, prefix, host)
        {
            out.extend_from_slice(&tag[copied..from]);
            out.extend_from_slice(url.as_bytes());
            copied = to;
        }
    }
    out.extend_from_slice(&tag[copied..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_below_the_prefix() {
        for (page, expected) in [
            ("<a href=\"/x\">test</a>", "<a href=\"/p/x\">test</a>"),
            ("<A class=b HREF = '/x?a=b'>", "<A class=b HREF = '/p/x?a=b'>"),
            ("<img src=/i.png>", "<img src=/p/i.png>"),
            (
                "<a href=x><a href=\"http://else/x\"><a href=//else/>",
                "<a href=x><a href=\"http://else/x\"><a href=//else/>",
            ),
            ("<a href=\"http://h:1/x\"><a href=\"//h:1\">", "<a href=\"/p/x\"><a href=\"/p\">"),
            ("<a href=\"/p/x\"><a href=/pq>", "<a href=\"/p/x\"><a href=/p/pq>"),
            ("<a href=\"http://h:12/x\">", "<a href=\"http://h:12/x\">"),
            ("<b href=\"/x\"> 1 < 2 </a href=\"/x\">", "<b href=\"/x\"> 1 < 2 </a href=\"/x\">"),
            (
                "<script src=\"/s\">\"<a href='/x'>\"</script><a href='/x'>",
                "<script src=\"/p/s\">\"<a href='/x'>\"</script><a href='/p/x'>",
            ),
            ("<!-- <a href='/x'> --><a title='a>b' href='/x'>", "<!-- <a href='/x'> --><a title='a>b' href='/p/x'>"),
            ("<a data-x=it's href='/x'>", "<a data-x=it's href='/p/x'>"),
            ("<a href='/x", "<a href='/x"),
            ("<", "<"),
        ] {
            // However the page is cut, the outcome is the same.
            for size in 1..=page.len() {
                let mut rewriter = Rewriter::new("/p".to_owned(), "h:1".to_owned());
                let mut got = Vec::new();
                for piece in page.as_bytes().chunks(size) {
                    got.extend(rewriter.push(piece));
                }
                got.extend(rewriter.finish());
                assert_eq!(String::from_utf8(got).as_deref(), Ok(expected), "in pieces of {size}");
            }
        }
    }
}
