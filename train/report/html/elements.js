"use strict";
// What the other scripts share. Text from files reaches the page as text nodes and attributes, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const button = (text, onclick, attributes = {}) =>
  make("button", {type: "button", class: "plain", onclick, ...attributes}, text);

function choice(options, onchange) {  // [[value, text], …]
  return make("select", {onchange}, ...options.map(([value, text]) => make("option", {value}, text)));
}

function short(value) {  // four digits, as the tables have them
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2).replace("e+", "e");
  return Number(value.toPrecision(4)).toString();
}

const LEARNERS = JSON.parse(document.getElementById("learners-data").textContent);
