//! The contract only grows: what an earlier program says on the wire is understood, field by field.
//!
//! `tests/data/contract/cairn.v1.binpb` is the contract as it was when it was last kept. After a change that adds to
//! it, keep it anew: `CAIRN_CONTRACT_WRITE=1 cargo test -p tests --test contract`.

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet, ServiceDescriptorProto,
};
use std::{collections::BTreeMap, fs, path::PathBuf};

fn kept() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data/contract/cairn.v1.binpb")
}

fn now() -> FileDescriptorSet {
    let mut set = FileDescriptorSet::decode(cairn_proto::FILE_DESCRIPTOR_SET).unwrap();
    set.file.iter_mut().for_each(|file| file.source_code_info = None);
    set
}

/// All messages, enums and services by name.
#[derive(Default)]
struct Contract {
    messages: BTreeMap<String, DescriptorProto>,
    enums: BTreeMap<String, EnumDescriptorProto>,
    services: BTreeMap<String, ServiceDescriptorProto>,
}

impl Contract {
    fn of(set: &FileDescriptorSet) -> Self {
        let mut contract = Self::default();
        for file in set.file.iter().filter(|file| file.package().starts_with("cairn.")) {
            for message in &file.message_type {
                contract.message(file.package(), message);
            }
            for kind in &file.enum_type {
                contract.enums.insert(format!("{}.{}", file.package(), kind.name()), kind.clone());
            }
            for service in &file.service {
                contract.services.insert(format!("{}.{}", file.package(), service.name()), service.clone());
            }
        }
        contract
    }

    fn message(&mut self, above: &str, message: &DescriptorProto) {
        let name = format!("{above}.{}", message.name());
        for inner in &message.nested_type {
            self.message(&name, inner);
        }
        for kind in &message.enum_type {
            self.enums.insert(format!("{name}.{}", kind.name()), kind.clone());
        }
        self.messages.insert(name, message.clone());
    }
}

/// What of a field is on the wire or in JSON.
fn shape(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    // An optional field is the only one of a oneof that nobody wrote.
    let oneof = match field.oneof_index {
        Some(index) if !field.proto3_optional() => message.oneof_decl[index as usize].name(),
        _ => "",
    };
    format!(
        "{} {:?} {:?} {} oneof '{oneof}' optional {}",
        field.name(),
        field.r#type(),
        field.label(),
        field.type_name(),
        field.proto3_optional()
    )
}

/// Everything that an earlier program would not understand any more.
fn broken(old: &FileDescriptorSet, new: &FileDescriptorSet) -> Vec<String> {
    let (old, new) = (Contract::of(old), Contract::of(new));
    let mut broken = Vec::new();
    for (name, was) in &old.messages {
        let Some(is) = new.messages.get(name) else {
            broken.push(format!("message {name} is gone"));
            continue;
        };
        for field in &was.field {
            let number = field.number();
            let place = format!("{name} field {number}");
            match is.field.iter().find(|field| field.number() == number) {
                Some(now) if shape(is, now) != shape(was, field) => {
                    broken.push(format!("{place}: was {}, is {}", shape(was, field), shape(is, now)));
                }
                Some(_) => {}
                None if is
                    .reserved_range
                    .iter()
                    .any(|range| (range.start()..range.end()).contains(&number)) => {}
                None => {
                    broken.push(format!("{place} ({}) is gone and its number not reserved", field.name()))
                }
            }
        }
    }
    for (name, was) in &old.enums {
        let Some(is) = new.enums.get(name) else {
            broken.push(format!("enum {name} is gone"));
            continue;
        };
        for value in &was.value {
            let same =
                is.value.iter().any(|now| (now.number(), now.name()) == (value.number(), value.name()));
            if !same {
                broken.push(format!("{name}: {} = {} is gone or changed", value.name(), value.number()));
            }
        }
    }
    for (name, was) in &old.services {
        let is = new.services.get(name).cloned().unwrap_or_default();
        for method in &was.method {
            let shape = |method: &prost_types::MethodDescriptorProto| {
                let streams = (method.client_streaming(), method.server_streaming());
                (method.input_type().to_owned(), method.output_type().to_owned(), streams)
            };
            match is.method.iter().find(|now| now.name() == method.name()) {
                Some(now) if shape(now) == shape(method) => {}
                found => {
                    broken.push(format!("{name}/{}: was {:?}, is {found:?}", method.name(), shape(method)))
                }
            }
        }
    }
    broken
}

#[test]
fn the_contract_only_grows() {
    let now = now();
    if std::env::var_os("CAIRN_CONTRACT_WRITE").is_some() {
        fs::create_dir_all(kept().parent().unwrap()).unwrap();
        fs::write(kept(), now.encode_to_vec()).unwrap();
    }
    let kept = FileDescriptorSet::decode(&fs::read(kept()).unwrap()[..]).unwrap();
    assert!(Contract::of(&kept).services.len() >= 5, "the kept contract is not whole");
    let broken = broken(&kept, &now);
    assert!(broken.is_empty(), "an earlier program would not understand this:\n{}", broken.join("\n"));
    if Contract::of(&kept).messages != Contract::of(&now).messages {
        println!("the contract has grown: keep it anew with CAIRN_CONTRACT_WRITE=1");
    }
}

#[test]
fn every_kind_of_break_is_noticed() {
    let good = now();
    type Change = fn(&mut DescriptorProto);
    let changes: [(&str, Change); 6] = [
        ("another number", |message| message.field[0].number = Some(77)),
        ("another name", |message| message.field[0].name = Some("other".into())),
        ("another type", |message| {
            message.field[0].set_type(prost_types::field_descriptor_proto::Type::Fixed32)
        }),
        ("another label", |message| {
            message.field[0].set_label(prost_types::field_descriptor_proto::Label::Repeated);
        }),
        ("gone", |message| drop(message.field.remove(0))),
        ("another message", |message| message.name = Some("Other".into())),
    ];
    for (what, change) in changes {
        let mut bad = good.clone();
        let messages = bad.file.iter_mut().flat_map(|file| &mut file.message_type);
        change(messages.into_iter().find(|message| message.name() == "LookupRequest").unwrap());
        assert!(!broken(&good, &bad).is_empty(), "{what} was not noticed");
    }
    let mut bad = good.clone();
    let services = bad.file.iter_mut().flat_map(|file| &mut file.service);
    services.into_iter().find(|service| service.name() == "FileService").unwrap().method[0]
        .server_streaming = None;
    assert_eq!(broken(&good, &bad).len(), 1);
    let mut bad = good.clone();
    for file in &mut bad.file {
        file.enum_type.iter_mut().for_each(|kind| kind.value[0].number = Some(99));
    }
    assert!(!broken(&good, &bad).is_empty());

    // Growth is none, nor is a field that went and left its number reserved.
    let mut grown = good.clone();
    for file in &mut grown.file {
        for message in &mut file.message_type {
            let field =
                FieldDescriptorProto { name: Some("later".into()), number: Some(900), ..Default::default() };
            message.field.push(field);
            if message.name() == "LookupRequest" {
                let number = message.field.remove(0).number();
                message.reserved_range.push(prost_types::descriptor_proto::ReservedRange {
                    start: Some(number),
                    end: Some(number + 1),
                });
            }
        }
    }
    assert_eq!(broken(&good, &grown), Vec::<String>::new());
}
