//! File names and paths: UTF-8, absolute, without `.`, `..`, empty names or NUL, and bounded.

use crate::{
    Error, Result,
    limits::{NAME_BYTES_MAX, PATH_BYTES_MAX, PATH_DEPTH_MAX},
};
use std::fmt;

/// One name in a directory: 1 to 255 bytes of UTF-8 without `/` or NUL, neither `.` nor `..`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileName(String);

impl FileName {
    /// Checks a name.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a forbidden name, `LIMIT_EXCEEDED` for one over 255 bytes.
    pub fn new(name: &str) -> Result<Self> {
        if name.is_empty() {
            return Err(Error::invalid("a file name is empty"));
        }
        if name == "." || name == ".." {
            return Err(Error::invalid(format!("'{name}' is not a file name")));
        }
        if name.len() > NAME_BYTES_MAX {
            return Err(Error::limit(format!(
                "a file name has {} bytes, more than the {NAME_BYTES_MAX} allowed: '{}...'",
                name.len(),
                name.chars().take(32).collect::<String>()
            )));
        }
        if name.contains(['/', '\0']) {
            return Err(Error::invalid(format!("the file name {name:?} contains '/' or NUL")));
        }
        Ok(Self(name.to_owned()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An absolute path: the names from the root. The root itself has none.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FilePath {
    names: Vec<FileName>,
}

impl FilePath {
    /// The root directory.
    pub const fn root() -> Self {
        Self { names: Vec::new() }
    }

    /// Checks a path. Repeated and trailing slashes are dropped; nothing else is guessed.
    ///
    /// ```
    /// use cairn_proto::path::FilePath;
    /// assert_eq!(FilePath::parse("//a/b/")?.to_string(), "/a/b");
    /// assert!(FilePath::parse("a/b").is_err());
    /// assert!(FilePath::parse("/a/../b").is_err());
    /// # Ok::<(), cairn_proto::Error>(())
    /// ```
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` for a relative path or a forbidden name, `LIMIT_EXCEEDED` beyond 4,096 bytes or 255 names.
    pub fn parse(path: &str) -> Result<Self> {
        if path.len() > PATH_BYTES_MAX {
            return Err(Error::limit(format!(
                "a path has {} bytes, more than the {PATH_BYTES_MAX} allowed",
                path.len()
            )));
        }
        let Some(rest) = path.strip_prefix('/') else {
            return Err(
                Error::invalid(format!("the path {path:?} is not absolute: begin it with '/'")).at(path)
            );
        };
        let names = rest
            .split('/')
            .filter(|name| !name.is_empty())
            .map(|name| FileName::new(name).map_err(|error| error.at(path)))
            .collect::<Result<Vec<_>>>()?;
        if names.len() > PATH_DEPTH_MAX {
            return Err(Error::limit(format!(
                "a path has {} names, more than the {PATH_DEPTH_MAX} allowed",
                names.len()
            )));
        }
        Ok(Self { names })
    }

    /// The names from the root.
    pub fn names(&self) -> &[FileName] {
        &self.names
    }

    /// Whether this is the root.
    pub fn is_root(&self) -> bool {
        self.names.is_empty()
    }

    /// The parent directory and the last name; nothing for the root.
    pub fn split_last(&self) -> Option<(FilePath, &FileName)> {
        let (last, parent) = self.names.split_last()?;
        Some((Self { names: parent.to_vec() }, last))
    }

    /// The last name, if any.
    pub fn file_name(&self) -> Option<&FileName> {
        self.names.last()
    }

    /// This path with one more name.
    ///
    /// # Errors
    /// As [`FilePath::parse`].
    pub fn join(&self, name: &str) -> Result<Self> {
        let mut names = self.names.clone();
        names.push(FileName::new(name)?);
        let path = Self { names };
        if path.names.len() > PATH_DEPTH_MAX || path.to_string().len() > PATH_BYTES_MAX {
            return Err(Error::limit(format!(
                "the path would exceed {PATH_BYTES_MAX} bytes or {PATH_DEPTH_MAX} names"
            )));
        }
        Ok(path)
    }

    /// Whether `self` is `other` or lies below it.
    pub fn starts_with(&self, other: &Self) -> bool {
        self.names.starts_with(&other.names)
    }
}

impl fmt::Display for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.names.is_empty() {
            return f.write_str("/");
        }
        self.names.iter().try_for_each(|name| write!(f, "/{name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Reason;

    #[test]
    fn names_are_bounded_and_clean() {
        assert!(FileName::new(&"n".repeat(255)).is_ok());
        assert_eq!(FileName::new(&"n".repeat(256)).unwrap_err().reason, Reason::LimitExceeded);
        for bad in ["", ".", "..", "a/b", "a\0b"] {
            assert_eq!(FileName::new(bad).unwrap_err().reason, Reason::InvalidArgument, "{bad:?}");
        }
        assert!(FileName::new("...").is_ok());
        assert!(FileName::new("naïve ✓ name").is_ok());
    }

    #[test]
    fn paths_are_normalised_and_bounded() {
        assert!(FilePath::parse("/").unwrap().is_root());
        assert_eq!(FilePath::parse("/a//b/").unwrap().to_string(), "/a/b");
        assert!(FilePath::parse("").is_err());
        let deep = "/a".repeat(256);
        assert_eq!(FilePath::parse(&deep).unwrap_err().reason, Reason::LimitExceeded);
        let long = format!("/{}", "x".repeat(4_096));
        assert_eq!(FilePath::parse(&long).unwrap_err().reason, Reason::LimitExceeded);
    }

    #[test]
    fn prefix_is_by_name_not_by_letter() {
        let path = |text: &str| FilePath::parse(text).unwrap();
        assert!(path("/a/b").starts_with(&path("/a")));
        assert!(!path("/ab").starts_with(&path("/a")));
    }
}
