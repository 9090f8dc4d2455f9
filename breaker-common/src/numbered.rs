//! The macro for enums whose numbers are stored in maps and events.

/// A number read from a map that is not a variant of the expected enum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownNumber(pub u8);

macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $number:literal => $label:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $($(#[$vmeta])* $variant = $number,)+ }

        impl $name {
            /// Every variant, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The name for logs, metrics and JSON.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }

        #[cfg(feature = "serde")]
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.label())
            }
        }

        #[cfg(feature = "serde")]
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Label;
                impl serde::de::Visitor<'_> for Label {
                    type Value = $name;
                    fn expecting(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                        f.write_str(concat!("one of", $(" ", $label,)+))
                    }
                    fn visit_str<E: serde::de::Error>(self, label: &str) -> Result<$name, E> {
                        match label { $($label => Ok($name::$variant),)+ other => Err(E::unknown_variant(other, &[$($label,)+])) }
                    }
                }
                deserializer.deserialize_str(Label)
            }
        }

        impl TryFrom<u8> for $name {
            type Error = $crate::UnknownNumber;
            fn try_from(number: u8) -> Result<Self, $crate::UnknownNumber> {
                match number { $($number => Ok(Self::$variant),)+ other => Err($crate::UnknownNumber(other)) }
            }
        }
    };
}
